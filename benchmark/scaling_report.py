"""Tables, sentences and the picture of `benchmark/scaling.py`; each says what was measured and what was computed."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from rich.table import Table

from benchmark.scaling_fit import Comparison, Extrapolation
from evaluation.report.style import COLOURS, DPI, png
from xfuser.core.distributed.clock import CATEGORIES

PARTS = (*CATEGORIES, "rest")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def machine_name(documents: dict[int, dict[str, Any]]) -> str:
    known = next(iter(documents.values()))["environment"]
    return known.get("accelerator") or f"{known['processor']}, {known['cores']} cores, one thread a process"


def measured_table(rows: Sequence[Comparison], documents: dict[int, dict[str, Any]], settings: dict[str, Any]) -> Table:
    table = Table(
        title=f"MEASURED, milliseconds a step, medians of {settings['repeats']}: {settings['model_type']}, "
        f"{settings['num_images']} images, {settings['steps']} steps, on {machine_name(documents)}; "
        f"cached: {settings['cache']}. Last column: COMPUTED."
    )
    titles = ("mesh", "cache", "total", "low to high", *PARTS, "statistics %", "skipped step", "bytes/step", "hit rate")
    for title in (*titles, "plans", "computed"):
        table.add_column(title, justify="left" if title in ("mesh", "cache") else "right")
    for row in rows:
        seen, facts = row.measured, row.facts
        table.add_row(
            row.mesh,
            "–" if row.variant == "uncached" else "yes",
            milliseconds(seen.total),
            f"{milliseconds(seen.low)} to {milliseconds(seen.high)}",
            *(milliseconds(seen.parts[name]) for name in PARTS),
            f"{seen.parts['statistics'] / seen.total:.1%}",
            milliseconds(row.skipped.total) if row.skipped else "–",
            f"{facts['bytes_per_step']:.0f}",
            f"{facts['hit_rate']:.1%}",
            "equal" if facts["digests_equal"] else "DIFFER",
            "–" if row.predicted is None else f"{milliseconds(row.predicted)} ({row.predicted / seen.total:.2f}×)",
            end_section=row.variant == "cached",
        )
    return table


def shares_sentence(rows: Sequence[Comparison], documents: dict[int, dict[str, Any]]) -> str:
    """Bar 6, the machine's slowdown, and how well the model holds, from the rows."""
    lines = []
    told = [row for row in rows if row.facts["collectives_per_step"]]
    if told:
        most = max(told, key=lambda row: row.measured.parts["statistics"] / row.measured.total)
        rate = max(row.facts["collectives_per_step"] for row in told)
        block = max(row.facts["bytes_per_step"] / row.facts["blocks"] for row in told)
        lines.append(
            f"Measured: at most {rate:g} statistics collective a step, {block:.1f} bytes a block and rank, and "
            f"{most.measured.parts['statistics'] / most.measured.total:.1%} of the step's time "
            f"({most.mesh}, {most.variant}), the wait for the other ranks included."
        )
    for world, document in documents.items():
        if "links" not in document:
            continue
        links, slower = document["links"], next(row.slower for row in rows if row.world == world)
        lines.append(
            f"Measured, {world} processes: exchange of sums {links['exchange'] * 1e6:.0f} µs when all ranks are ready "
            f"(bare) and {links['busy_exchange'] * 1e6:.0f} µs when they come from a millisecond of computing, "
            f"all-to-all {links['latency'] * 1e6:.0f} and {links['busy_latency'] * 1e6:.0f} µs, + bytes / "
            f"{links['bandwidth'] / 1e9:.2f} GB/s; a process computes "
            f"{slower:.2f} times as long as alone when all of them are busy (data {world})."
        )
    known = [row.predicted / row.measured.total for row in rows if row.predicted is not None and row.world > 1]
    if known:
        lines.append(
            f"The model's prediction from one process and the links of busy ranks is {min(known):.2f} to "
            f"{max(known):.2f} times what was measured on several (median {statistics.median(known):.2f}). Where "
            "processes share cores with others, a collective is mostly the wait for a peer without one; the "
            "extrapolation supposes a device for every rank."
        )
    unfit = [f"{mesh}: {why}" for each in documents.values() for mesh, why in each["unfit"].items()]
    return "\n".join(lines + [f"Not measured, {each}" for each in unfit])


def computed_table(
    name: str, rows: Sequence[Extrapolation], args: argparse.Namespace, decision_a_block: float
) -> Table:
    table = Table(
        title=f"COMPUTED, not measured: {name}, milliseconds a step, best layout of each; evaluated share "
        f"{args.evaluated_share:g}, {args.flops / 1e12:g} TFLOP/s a GPU, inside a node {args.inside_bandwidth / 1e9:g} "
        f"GB/s and {args.inside_latency * 1e6:g} µs, between nodes {args.across_bandwidth / 1e9:g} GB/s and "
        f"{args.across_latency * 1e6:g} µs, gloo round {args.control_latency * 1e6:g} and "
        f"{args.control_across_latency * 1e6:g} µs, block {args.block_seconds * 1e6:g} µs, decision "
        f"{decision_a_block * 1e6:.0f} µs a block"
    )
    titles = (
        "GPUs",
        "layout uncached",
        "uncached",
        "layout cached",
        "cached",
        "speed-up of the cache",
        "on the trajectory",
    )
    for title in (*titles, "evaluated", "skipped", "statistics", "% of evaluated", "% of skipped"):
        table.add_column(title, justify="left" if title.startswith("layout") else "right")
    for row in rows:
        table.add_row(
            str(row.ranks),
            row.uncached_layout.name,
            milliseconds(row.uncached),
            row.layout.name,
            milliseconds(row.cached),
            f"{row.speedup:.2f}×",
            f"{row.trajectory_speedup:.2f}×",
            milliseconds(row.evaluated),
            milliseconds(row.skipped),
            milliseconds(row.statistics),
            f"{row.evaluated_share:.2%}",
            f"{row.skipped_share:.2%}",
        )
    return table


def plain(row: Extrapolation) -> dict[str, Any]:
    names = {"uncached_layout": row.uncached_layout.name, "layout": row.layout.name}
    return asdict(row) | names | {"speedup": row.speedup, "trajectory_speedup": row.trajectory_speedup}


def draw(
    rows: Sequence[Comparison],
    documents: dict[int, dict[str, Any]],
    computed: dict[str, list[Extrapolation]],
    share: float,
) -> bytes:
    """A PNG: above, stacked bars of the measured steps with the model's prediction; below, what was only computed."""
    figure = Picture(figsize=(13, 10.5), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    _measured(figure.add_subplot(grid[0, :]), rows, machine_name(documents))
    speed, cost = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    for colour, (name, each) in zip(COLOURS, computed.items(), strict=False):
        ranks = [row.ranks for row in each]
        speed.plot(ranks, [row.speedup for row in each], "o-", color=colour, label=name)
        several = [row for row in each if row.ranks > 1]
        ranks = [row.ranks for row in several]
        shares = ([row.skipped_share for row in several], [row.evaluated_share for row in several])
        for (kind, line), values in zip((("skipped", "s--"), ("evaluated", "o-")), shares, strict=True):
            cost.plot(ranks, [100 * value for value in values], line, color=colour, label=f"{name}, {kind} step")
    speed.axhline(1, color="#888888", linewidth=0.8)
    speed.set(ylabel="speed-up of the cache (×)", ylim=(0, None))
    speed.set_title(f"COMPUTED, not measured: evaluated share {share:g}", loc="left", fontsize=10)
    cost.set_yscale("log")
    for limit in (1, 5):
        cost.axhline(limit, color="#888888", linewidth=0.8)
        cost.annotate(f"{limit}%", (2, limit), textcoords="offset points", xytext=(-14, 2), fontsize=8)
    cost.set(ylabel="the statistics exchange, % of the step")
    cost.set_title("COMPUTED, not measured: the agreement's cost", loc="left", fontsize=10)
    for axes in (speed, cost):
        axes.set_xscale("log", base=2)
        axes.set_xticks([row.ranks for row in next(iter(computed.values()))])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("GPUs for one image")
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.legend(fontsize=8, frameon=False)
    return png(figure)


def _measured(axes: Axes, rows: Sequence[Comparison], machine: str) -> None:
    places = range(len(rows))
    bottom = [0.0] * len(rows)
    for colour, name in zip(COLOURS, PARTS, strict=False):
        heights = [1e3 * row.measured.parts[name] for row in rows]
        axes.bar(places, heights, bottom=bottom, color=colour, width=0.7, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    totals = [1e3 * row.measured.total for row in rows]
    ends = [[1e3 * (row.measured.total - row.measured.low) for row in rows]]
    ends.append([1e3 * (row.measured.high - row.measured.total) for row in rows])
    axes.errorbar(places, totals, yerr=ends, fmt="none", color="black", capsize=2.5, linewidth=1)
    known = [index for index in places if rows[index].predicted is not None]
    predicted = [1e3 * (rows[index].predicted or 0.0) for index in known]
    axes.plot(known, predicted, "D", color="white", markeredgecolor="black", label="COMPUTED by the cost model")
    names = [f"{row.mesh}{'' if row.variant == 'uncached' else ', cached'}" for row in rows]
    axes.set_xticks(places, names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("milliseconds a step")
    axes.set_title(f"MEASURED on {machine}: bars, lowest to highest as lines", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=2)
