"""The picture of a sweep: each method's curve of quality against speed, and the frontier of them all."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evaluation.report.columns import is_finite
from evaluation.report.style import COLOURS, DPI, MARKERS, kind, label_points, png

UNCACHED = "#444444"
_LINES = {"plain": "-", "variant": ":", "corrected": "-", "opponent": "--"}
_WIDTHS = {"corrected": 2.0}


def sweep_curves(results: Sequence[Mapping[str, Any]], sweep: Mapping[str, Any]) -> bytes:
    """Draw PSNR against the speedup (above) and against the share of FLOPs computed (below), one line a curve.

    Args:
        results: The ``results`` of the benchmark's document. The uncached row has no PSNR to itself, and no point.
        sweep: Its ``sweep``: ``curves``, each the names of its rows, and ``frontier``, the names of the rows on it by
            the field that is the speed.

    Returns:
        A PNG. Right is faster in both panels; the points on the panel's frontier are ringed, named and joined.

    Raises:
        KeyError: A curve names a row that is not among the results, or a row lacks ``speedup`` or ``flops_saved``.
    """
    rows = {row["method"]: row for row in results}
    drawn = {
        name: [rows[method] for method in methods if is_finite((rows[method].get("psnr") or {}).get("value"))]
        for name, methods in sweep["curves"].items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    colours = _colours(drawn)
    figure = Figure(figsize=(9.5, 11.0), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1)
    figure.subplots_adjust(left=0.08, right=0.97, top=0.92, bottom=0.06, hspace=0.18)
    upper.set_xlabel("speedup over no cache (×)")
    lower.set_xlabel("share of the FLOPs computed (1 − FLOPs saved)")
    _panel(upper, drawn, colours, sweep["frontier"]["speedup"], "speedup")
    lower.invert_xaxis()
    _panel(lower, drawn, colours, sweep["frontier"]["flops_saved"], "flops_saved")
    handles = [_line(kind(points[0]), colours[name], label=name) for name, points in drawn.items()]
    handles.append(Line2D([], [], label="on the frontier", **_RING))
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=8)
    return png(figure)


_RING = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 13,
    "markerfacecolor": "none",
    "markeredgecolor": "black",
    "markeredgewidth": 1.1,
}


def _colours(drawn: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """One colour a base method, whose name is in front of its settings' (``Tea@0.06``)."""
    bases = {name: str(points[0]["base"]).split("@")[0] for name, points in drawn.items()}
    palette: dict[str, str] = {}
    for name, points in drawn.items():
        if kind(points[0]) != "opponent":
            palette.setdefault(bases[name], COLOURS[len(palette) % (len(COLOURS) - 1)])
    return {name: UNCACHED if kind(points[0]) == "opponent" else palette[bases[name]] for name, points in drawn.items()}


def _line(sort: str, colour: str, **properties: Any) -> Line2D:
    return Line2D(
        *properties.pop("data", ([], [])),
        color=colour,
        linestyle=_LINES[sort],
        linewidth=_WIDTHS.get(sort, 1.1),
        marker=MARKERS[sort],
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        **properties,
    )


def _panel(
    axes: Axes,
    drawn: Mapping[str, Sequence[Mapping[str, Any]]],
    colours: Mapping[str, str],
    frontier: Sequence[str],
    speed: str,
) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylabel("PSNR to the uncached images (dB), higher is closer")
    axes.margins(x=0.08, y=0.1)
    points: dict[str, tuple[float, float]] = {}
    owners: dict[str, str] = {}
    lines: list[np.ndarray] = []
    for name, rows in drawn.items():
        places = [(_place(row, speed), float(row["psnr"]["value"])) for row in rows]
        axes.add_line(_line(kind(rows[0]), colours[name], data=zip(*places, strict=True), zorder=3))
        lines += [np.array(ends) for ends in pairwise(places)]
        for row, place in zip(rows, places, strict=True):
            points[row["method"]], owners[row["method"]] = place, name
    best = [points[method] for method in frontier if method in points]
    if best:
        axes.plot(*zip(*best, strict=True), color="black", linewidth=6, alpha=0.08, zorder=1)
        axes.plot(*zip(*best, strict=True), zorder=4, **_RING)
    named = {method: points[method] for method in frontier if method in points}
    label_points(axes, named, {method: colours[owners[method]] for method in named}, lines)


def _place(row: Mapping[str, Any], speed: str) -> float:
    return float(row["speedup"]) if speed == "speedup" else 1 - float(row["flops_saved"])
