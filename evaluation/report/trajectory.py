"""What the trajectory level did, in one picture: error over the steps, prediction, plan and weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.report.style import DPI, png

BLUE, RED, GREY = "#2b6cb0", "#b04a3a", "#888888"


def trajectory_panel(record: Mapping[str, Any]) -> bytes:
    """Draw one record.

    Args:
        record: ``kinds`` (per step 0, 1 or 2 half evaluations), ``weights`` (per step, a list of numbers), ``psnr``
            (pairs of a predicted PSNR and the true ones of new images, in dB), and, where latents were watched,
            ``errors``: by name, the latent's relative distance to the reference after every step.

    Returns:
        A PNG.
    """
    errors = record.get("errors")
    figure = Figure(figsize=(11, 6), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    if errors:
        (curve, scatter), (strip, heat) = figure.subplots(2, 2, gridspec_kw={"height_ratios": [3, 2]})
        _error_curve(curve, errors)
    else:
        grid = figure.add_gridspec(2, 2, height_ratios=[2, 3])
        strip, heat = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0])
        scatter = figure.add_subplot(grid[1, 1])
    _scatter(scatter, record["psnr"])
    share = sum(record["kinds"]) / (2 * len(record["kinds"]))
    strip.bar(range(len(record["kinds"])), [kind / 2 for kind in record["kinds"]], width=0.9, color=BLUE)
    strip.set(xlabel="step", yticks=[0, 0.5, 1], ylabel="evaluated", title=f"The plan: {share:.0%} of all evaluations")
    _heat(figure, heat, record["weights"])
    return png(figure)


def _error_curve(axes: Axes, errors: Mapping[str, Sequence[float]]) -> None:
    for (name, values), colour in zip(errors.items(), (BLUE, RED, GREY), strict=False):
        axes.semilogy([value if value > 0 else np.nan for value in values], color=colour, label=name)
    axes.set(xlabel="step", ylabel="relative error", title="The latent's distance to the reference")
    axes.legend(frameon=False)


def _scatter(axes: Axes, pairs: Sequence[tuple[float, Sequence[float]]]) -> None:
    for predicted, true in pairs:
        axes.plot([predicted] * len(true), true, ".", color=BLUE, alpha=0.4)
        axes.plot(predicted, float(np.mean(true)), "o", color="#1a202c")
    ends = axes.get_xlim() if len(pairs) > 1 else axes.get_ylim()
    axes.plot(ends, ends, "--", color=GREY, linewidth=0.8)
    axes.set(xlabel="predicted PSNR (dB)", ylabel="true PSNR (dB)", title="New images; their mean in black")


def _heat(figure: Figure, axes: Axes, weights: Sequence[Sequence[float]]) -> None:
    table = np.full((max(map(len, weights)), len(weights)), np.nan)
    for step, numbers in enumerate(weights):
        table[: len(numbers), step] = numbers
    limit = float(np.nanquantile(np.abs(table), 0.98)) or 1.0
    shown = axes.imshow(table, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set(xlabel="step", ylabel="feature", title="Learned weights: outputs by branch, newest first; the latent")
    figure.colorbar(shown, ax=axes)
