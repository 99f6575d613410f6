"""What the comparison with other projects shows: a table, pairs of rows, pictures.

    python benchmark/peers_report.py peers_results/peers.json --output docs/images/frontier.png

draws the README's picture from what benchmark/peers.py has written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.metrics import difference_interval  # noqa: E402
from evaluation.report.columns import told_from_noise  # noqa: E402
from evaluation.report.style import COLOURS, DPI, png  # noqa: E402
from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.files import replacing  # noqa: E402

SLACK = 0.01  # share of the work by which an opponent may exceed a row that it is compared with
OPPONENTS_OF = "trajectory"
SHOWN = (0.18, 0.62)  # shares of the work, in the README's picture
APART = 0.047  # of the picture's height, from one name to the next
# What the README calls the families; the others keep their own names.
NAMES = {
    "trajectory": "AdaCorrection on the trajectory",
    "Tea+AdaCorrection": "AdaCorrection on blocks (Tea)",
    "L2P, Adam": "L2P\u2019s scheme",
    "fewer steps, DDIM": "fewer steps, DDIM",
    "diffusers TaylorSeer-1, parts": "diffusers TaylorSeer",
    "cache-dit F1B0 TaylorSeer-1": "cache-dit F1B0, TaylorSeer",
    "cache-dit F8B0 TaylorSeer-1": "cache-dit F8B0, TaylorSeer",
}


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the rows out for the terminal; a row that does not run says so."""
    table = Table(title="PSNR, SSIM and FID to the uncached images, KID to real ones; fine: PSNR to the fine solution")
    table.add_column("row", no_wrap=True)
    titles = ("compute", "inside", "speed-up", "PSNR", "worst 10%", "fine", "worst 10%", "SSIM", "FID", "KID", "MB")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if row["does_not_run"]:
            continue
        fid, held = row["fid_vs_uncached"], row["bytes_held"]
        table.add_row(
            row["row"],
            f"{row['compute']:.3f}",
            f"{row['compute_inside']:.3f}",
            "—" if row["speedup"] is None else f"{row['speedup']:.2f}×",
            f"{row['psnr']['value']:.2f}",
            f"{row['psnr_worst_tenth']:.2f}",
            f"{row['psnr_fine']['value']:.2f}",
            f"{row['psnr_fine_worst_tenth']:.2f}",
            f"{row['ssim']['value']:.4f}",
            "—" if fid is None else f"{fid['value']:.3f}",
            "—" if not told_from_noise(row["kid_vs_real"]) else f"{row['kid_vs_real']['value']:.4f}",
            "—" if held is None else f"{held / 1e6:.1f}",
        )
    return table


def frontier_picture(rows: Sequence[dict[str, Any]], ours: str) -> bytes:
    """Draw PSNR over work, one line a family, ``ours`` thick: to the uncached images and to the fine solution."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["does_not_run"] and row["settings"]:
            families.setdefault(row["family"], []).append(row)
    figure = Figure(figsize=(12, 10), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.07, right=0.74, top=0.98, bottom=0.06, hspace=0.06)
    for axes, key, what in ((upper, "psnr", "the uncached images"), (lower, "psnr_fine", "the fine solution")):
        for index, (family, members) in enumerate(families.items()):
            members = sorted(members, key=lambda row: row["compute_inside"])
            axes.plot(
                [row["compute_inside"] for row in members],
                [row[key]["value"] for row in members],
                color="black" if family == ours else COLOURS[index % len(COLOURS)],
                linestyle=("-", "--", ":", "-.")[index // len(COLOURS) % 4],
                marker="osD^vPX*"[(index + 3 * (index // 8)) % 8],  # a colour comes back with another marker
                markersize=5,
                linewidth=2.4 if family == ours else 1.2,
                label=family,
            )
        axes.set_ylabel(f"PSNR to {what} (dB)")
        axes.grid(alpha=0.25)
    lower.set_xlabel("share of the uncached run's work, counted inside the blocks")
    if families:
        upper.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
    return png(figure)


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each trajectory row with the best row of every other family of no more work, by image."""
    finished = [row for row in rows if not row["does_not_run"] and row["settings"]]
    comparisons = []
    for ours in (row for row in finished if row["family"] == OPPONENTS_OF):
        best: dict[str, dict[str, Any]] = {}
        for row in finished:
            cheap = row["compute_inside"] <= ours["compute_inside"] + SLACK
            if row["family"] == OPPONENTS_OF or not cheap:
                continue
            known = best.get(row["family"])
            if known is None or row["psnr"]["value"] > known["psnr"]["value"]:
                best[row["family"]] = row
        for theirs in best.values():
            differences = {
                f"{name}_difference": difference_interval(ours["images"][name], theirs["images"][name]).to_dict()
                for name in ("psnr", "psnr_fine")
            }
            comparisons.append({"row": ours["row"], "against": theirs["row"], **differences})
    return comparisons


def short_picture(rows: Sequence[Mapping[str, Any]], ours: str) -> bytes:
    """Draw PSNR to the uncached images over work, one line a family with its name beside it, ``ours`` thick."""
    lines = _lines(rows)
    figure = Figure(figsize=(9, 5), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.07, right=0.69, top=0.97, bottom=0.11)
    colours = iter(COLOURS * (1 + len(lines) // len(COLOURS)))
    drawn = {family: "black" if family == ours else next(colours) for family in lines}
    for index, (family, points) in enumerate(lines.items()):
        axes.plot(
            *zip(*points, strict=True),
            color=drawn[family],
            linestyle="-" if index < len(COLOURS) or family == ours else "--",
            marker="o" if family == ours else "osD^vP*"[index % 7],
            markersize=7 if family == ours else 4.5,
            linewidth=3 if family == ours else 1.3,
            zorder=3 if family == ours else 2,
        )
    axes.set_xlim(*SHOWN)
    axes.grid(alpha=0.25)
    axes.set_xlabel("share of the uncached run\u2019s work, counted inside the blocks")
    axes.set_ylabel("PSNR to the uncached images (dB)")
    low, high = axes.get_ylim()
    ends = {family: (points[-1][0], (points[-1][1] - low) / (high - low)) for family, points in lines.items()}
    for family, height in _spread({family: end[1] for family, end in ends.items()}).items():
        axes.annotate(
            NAMES.get(family, family),
            (ends[family][0], low + ends[family][1] * (high - low)),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=drawn[family],
            fontsize=10 if family == ours else 9,
            fontweight="bold" if family == ours else "normal",
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": drawn[family], "linewidth": 0.6, "alpha": 0.6, "shrinkB": 3},
        )
    return png(figure)


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Collect each family's points (work, PSNR) that the picture shows, by work."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if not row["does_not_run"] and row["settings"] and SHOWN[0] <= row["compute_inside"] <= SHOWN[1]:
            lines.setdefault(row["family"], []).append((row["compute_inside"], row["psnr"]["value"]))
    return {family: sorted(points) for family, points in lines.items()}


def _spread(wanted: Mapping[str, float]) -> dict[str, float]:
    """Move heights apart where they are nearer than `APART`, none of them over the top."""
    heights: dict[str, float] = {}
    above = 1.0
    for name in sorted(wanted, key=lambda each: -wanted[each]):
        heights[name] = above = min(wanted[name], above)
        above -= APART
    below = 0.0
    for name in sorted(heights, key=lambda each: heights[each]):
        heights[name] = max(heights[name], below)
        below = heights[name] + APART
    return heights


def main() -> None:
    parser = OneLineParser(description="Draw the README's picture of the frontier.")
    parser.add_argument("results", type=Path, help="peers.json")
    parser.add_argument("--output", type=Path, default=Path("frontier.png"), help="default: %(default)s")
    args = parser.parse_args()
    document = json.loads(args.results.read_text(encoding="utf-8"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as temporary:
        temporary.write_bytes(short_picture(document["results"], OPPONENTS_OF))
    print(args.output)


if __name__ == "__main__":
    main()
