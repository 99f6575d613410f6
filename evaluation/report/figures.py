"""Pictures of a benchmark, drawn with matplotlib's Agg canvas and returned as PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from evaluation.report.columns import is_finite
from evaluation.report.style import DPI, KINDS, MARKERS, family, family_colours, kind, label_points, log_ticks, png


def quality_speed_curve(results: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw quality against speed: PSNR to the uncached images above, FID to them below.

    Args:
        results: The ``results`` of the benchmark's document. A row is left out of a panel where its score is None or
            infinite (the uncached row has no PSNR to itself), and an inactive one of both. The FID panel is logarithmic
            if all its values are above zero.

    Returns:
        A PNG. x is the speedup (times), y the PSNR (dB) with its interval as error bars, and FID (no unit). A thin
        line joins each corrected method to the method it corrects.

    Raises:
        KeyError: A row has no ``method`` or ``speedup``.
    """
    figure = Figure(figsize=(9.5, 9.2), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.09, right=0.97, top=0.95, bottom=0.07, hspace=0.08)
    upper.set_ylabel("PSNR to the uncached images (dB), higher is closer")
    lower.set_ylabel("FID to the uncached images, lower is closer")
    lower.set_xlabel("speedup over no cache (×)")
    panels = [(axes, _score_panel(axes, key, results)) for axes, key in ((upper, "psnr"), (lower, "fid_vs_uncached"))]
    # Only now: the panels share their x axis, so the second one can still move the first one's points.
    for axes, (points, colours, lines) in panels:
        label_points(axes, points, colours, lines)
    handles = [
        Line2D([], [], color="#555555", linestyle="none", marker=MARKERS[name], label=label)
        for name, label in KINDS.items()
    ]
    handles.append(Line2D([], [], color="#555555", linewidth=0.8, label="base to corrected"))
    figure.legend(handles=handles, loc="upper center", ncols=5, frameon=False, fontsize=8)
    return png(figure)


def decision_map(trace: Mapping[str, Sequence[Sequence[float | None]]]) -> bytes:
    """Draw what one AdaCorrection run decided, block by block and step by step.

    Args:
        trace: ``evaluated`` (0 or 1), ``predicted`` and ``true`` (relative errors, None where there is none) and
            ``weights`` (correction weights, None where none was used), each ``[steps][blocks]``.

    Returns:
        A PNG with three panels over the sampling steps: the predicted error of each block with a dot where it was
        evaluated; the true error seen at those evaluations in the same logarithmic colours; and the correction weight
        averaged over blocks. Cells without a value are blank.

    Raises:
        KeyError: A field is missing.
        ValueError: The fields are empty, ragged or differ in shape.
    """
    fields = trace_arrays(trace)
    steps, blocks = fields["evaluated"].shape
    width = float(np.clip(2.2 + 0.26 * steps, 7.5, 15.0))
    height = float(np.clip(0.2 * blocks, 1.6, 5.0))
    figure = Figure(figsize=(width, 2 * height + 2.9), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, width_ratios=[width * 4, 1], height_ratios=[height, height, 1.2])
    top = figure.add_subplot(grid[0, 0])
    middle = figure.add_subplot(grid[1, 0], sharex=top, sharey=top)
    bottom = figure.add_subplot(grid[2, 0], sharex=top)
    norm = _error_scale(fields["predicted"], fields["true"])
    mesh = _heat_map(top, fields["predicted"], norm)
    _heat_map(middle, fields["true"], norm)
    top.set_title("predicted error", loc="left", fontsize=10)
    middle.set_title("true error, seen where a block was evaluated", loc="left", fontsize=10)
    cell = 72 * min((width - 1.8) / steps, height / blocks)
    step, block = np.nonzero(fields["evaluated"])
    size = float(np.clip((0.42 * cell) ** 2, 2.0, 36.0))
    top.scatter(step, block, s=size, facecolor="white", edgecolor="black", linewidth=0.7)
    _map_legend(top)
    bar = figure.colorbar(mesh, cax=figure.add_subplot(grid[0:2, 1]), label="relative error")
    log_ticks(bar.ax, norm.vmin, norm.vmax)
    _weight_line(bottom, fields["weights"])
    for axes in (top, middle):
        axes.tick_params(labelbottom=False)
        axes.set_ylabel("block")
    return png(figure)


def trace_arrays(trace: Mapping[str, Sequence[Sequence[float | None]]]) -> dict[str, np.ndarray]:
    """Read a trace into float arrays, None becoming NaN.

    Args:
        trace: As for :func:`decision_map`.

    Returns:
        ``evaluated``, ``predicted``, ``true`` and ``weights``, each ``[steps, blocks]``.

    Raises:
        KeyError: A field is missing.
        ValueError: The fields are empty, ragged or differ in shape.
    """
    fields: dict[str, np.ndarray] = {}
    for name in ("evaluated", "predicted", "true", "weights"):
        rows = trace[name]
        if len({len(row) for row in rows}) != 1 or len(rows[0]) == 0:
            raise ValueError(f"trace field {name!r} must be a non-empty table of steps by blocks")
        fields[name] = np.array([[np.nan if x is None else float(x) for x in row] for row in rows])
    shapes = {name: field.shape for name, field in fields.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"trace fields differ in shape: {shapes}")
    fields["evaluated"] = np.nan_to_num(fields["evaluated"])
    return fields


def _score_panel(
    axes: Axes, key: str, results: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, tuple[float, float]], dict[str, str], list[np.ndarray]]:
    """Draw one score; return each drawn method's point and colour, and the lines that labels should keep off."""
    rows = {
        row["method"]: row
        for row in results
        if row.get(key) and is_finite(row[key]["value"]) and not row.get("inactive")
    }
    points = {method: (float(row["speedup"]), float(row[key]["value"])) for method, row in rows.items()}
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    if not points:
        axes.text(0.5, 0.5, "no method has this score", transform=axes.transAxes, ha="center", color="#666666")
        axes.set_yticks([])
        return {}, {}, []
    logarithmic = key == "fid_vs_uncached" and min(y for _, y in points.values()) > 0
    floor = 0.5 * min(y for _, y in points.values()) if logarithmic else -np.inf
    families = family_colours(results)
    colours = {method: families[family(row)] for method, row in rows.items()}
    lines = []
    for method, row in rows.items():
        x, y = points[method]
        low, high = (end if is_finite(end) else y for end in (row[key].get("low"), row[key].get("high")))
        # An interval that reaches zero has no lower end on a logarithmic axis; its bar stops at half the best score.
        low = min(y, max(low, floor))
        high = max(y, high)
        axes.errorbar(
            x,
            y,
            yerr=[[y - low], [high - y]],
            fmt=MARKERS[kind(row)],
            color=colours[method],
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.0,
            capsize=2.5,
            zorder=3,
        )
        lines.append(np.array([(x, low), (x, high)]))
        if kind(row) == "corrected" and row["base"] in points:
            lines.append(np.array([points[row["base"]], (x, y)]))
            axes.plot(*lines[-1].T, color=colours[method], linewidth=0.8, alpha=0.7, zorder=2)
    axes.margins(x=0.1, y=0.12)
    if logarithmic:
        axes.set_yscale("log")
        log_ticks(axes, *axes.get_ylim())
    return points, colours, lines


def _error_scale(*errors: np.ndarray) -> LogNorm:
    values = np.concatenate([error[np.isfinite(error) & (error > 0)] for error in errors])
    if values.size == 0:
        return LogNorm(1e-3, 1.0)
    low, high = float(values.min()), float(values.max())
    # A logarithmic scale needs two different ends, even when every error is the same.
    return LogNorm(low, high) if high > 1.05 * low else LogNorm(low / 2, high * 2)


def _heat_map(axes: Axes, errors: np.ndarray, norm: LogNorm) -> Any:
    steps, blocks = errors.shape
    # An error of exactly zero has no logarithm; it gets the lowest colour, because blank means "not known".
    shown = np.where(np.isfinite(errors), np.maximum(errors, norm.vmin), np.nan)
    edges = np.arange(steps + 1) - 0.5, np.arange(blocks + 1) - 0.5
    mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(shown.T), norm=norm, cmap="viridis")
    axes.set_xlim(-0.5, steps - 0.5)
    axes.set_ylim(-0.5, blocks - 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    return mesh


def _map_legend(axes: Axes) -> None:
    dot = {"markerfacecolor": "white", "markeredgecolor": "black", "markersize": 5.5}
    axes.legend(
        handles=[
            Line2D([], [], linestyle="none", marker="o", label="block evaluated", **dot),
            Patch(facecolor="white", edgecolor="#888888", label="blank: no value"),
        ],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        frameon=False,
        fontsize=9,
        borderpad=0.1,
    )


def _weight_line(axes: Axes, weights: np.ndarray) -> None:
    known = np.isfinite(weights)
    count = known.sum(axis=1)
    mean = np.where(count > 0, np.where(known, weights, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)
    axes.plot(np.arange(len(mean)), mean, color="#D55E00", marker="o", markersize=3.5, linewidth=1.3)
    axes.set_ylim(min(0.0, np.nanmin(mean, initial=0.0)), 1.08 * max(1.0, np.nanmax(mean, initial=1.0)))
    axes.set_title("correction weight, mean over blocks", loc="left", fontsize=10)
    axes.set_xlabel("sampling step")
    axes.set_ylabel("weight")
    axes.grid(color="#e4e4e4", linewidth=0.7)
