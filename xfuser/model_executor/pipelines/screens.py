"""One screen for what was generated: how fast, and what the cache did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(document: dict[str, Any], folder: Path) -> None:
    """One screen: what was generated, how fast, and what the cache did."""
    cache = document["cache"]
    if cache["method"] == "trajectory":
        print_trajectory(document, folder)
        return
    table, made = _titled(document, folder), document["generated"]
    rows = {
        "seconds": f"{document['seconds']:.2f} ({made / document['seconds']:.2f} images/s)",
        "base method": str(cache["method"]),
        "steps x blocks": f"{cache['steps']} x {cache['blocks']}, {cache['branches']} branch(es)",
    }
    plan = ""
    if cache["method"] is not None:
        rows |= {
            "AdaCorrection": str(cache["adacorrection"]),
            "approximation": cache["approximation"],
            "hit rate": f"{cache['hit_rate']:.1%} of block evaluations",
            "FLOPs saved": f"{cache['flops_saved']:.1%}",
            "non-finite values caught": str(cache["non_finite"]),
        }
        plan = _plan_line(next(iter(cache["plan"].values()), []), cache["blocks"])
    if cache["prediction_coverage"] is not None:
        rows["errors within prediction"] = f"{cache['prediction_coverage']:.1%}"
    for name, value in rows.items():
        table.add_row(name, value)
    _show(table, plan)


def print_trajectory(document: dict[str, Any], folder: Path) -> None:
    """One screen: what was asked of the trajectory, predicted, and got."""
    cache, made = document["cache"], document["generated"]
    table = _titled(document, folder)
    predicted, got = cache["predicted"] or {}, cache["got"]
    rows = {
        "seconds": f"{document['seconds']:.2f} ({made / document['seconds']:.2f} images/s, learning included)",
        "asked": ", ".join(f"{name} {value:g}" for name, value in cache["asked"].items()),
        "evaluated": f"{cache['evaluated_share']:.1%} of {cache['steps']} steps' evaluations, in the last batch",
        "speed-up": f"predicted {_number(predicted.get('speedup'))}, got {_number(got['speedup'])}",
        "PSNR to uncached": f"predicted {_number(predicted.get('psnr'))} dB, from {cache['images_known']} image(s)",
        "generations": f"{cache['generations']}, of which {cache['learned_generations']} were learned from, in full",
    }
    if cache.get("base"):
        rows["base method"] = f"{cache['base']}: counted in the first batch, in full, then spent"
    if cache["non_finite"]:
        rows["corrections dropped"] = f"{cache['non_finite']} steps, not finite"
    if cache["not_learned_because"]:
        rows["not learned"] = cache["not_learned_because"]
    for name, value in rows.items():
        table.add_row(name, value)
    _show(table, cache["strip"])


def _show(table: Table, plan: str) -> None:
    """The table, and under it the plan: beside the other rows' names, 50 steps would not fit into 80 columns."""
    console = Console()
    console.print(table)
    if plan:
        console.print(f"per step, █ evaluated, ▄ in part, · not:\n{plan}", markup=False, highlight=False)


def _titled(document: dict[str, Any], folder: Path) -> Table:
    count, made = len(document["images"]), document["generated"]
    before = "" if made == count else f", {made} of them made now"
    return Table(show_header=False, title=f"{document['model']}: {count} images in {folder}{before}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _plan_line(plan: list[list[int]], blocks: int) -> str:
    """One character a step: a full block for all evaluated, a dot for none, a half block for some."""
    return "".join("█" if sum(step) == blocks else "·" if sum(step) == 0 else "▄" for step in plan)
