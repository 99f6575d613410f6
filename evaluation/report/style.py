"""What the pictures of a benchmark have in common: colours, markers, axes, and names beside their points."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

DPI = 130
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5195", "#8C6D1F", "#56B4E9", "#444444")
MARKERS = {"plain": "o", "variant": "s", "corrected": "D", "opponent": "X"}
KINDS = {
    "plain": "base method",
    "variant": "same approximation, no correction",
    "corrected": "with correction",
    "opponent": "no cache, fewer steps",
}
# Offsets in points at which a label may stand beside its point, nearest first; the first free one is taken.
_PLACES = [
    (distance * x, distance * y)
    for distance in (8, 16, 26, 38, 52)
    for x, y in ((1, 0.4), (1, -0.4), (0, 1), (0, -1), (-1, 0.4), (-1, -0.4), (0.8, 0.9), (0.8, -0.9), (-0.8, 0.9))
]


def family(row: Mapping[str, Any]) -> str:
    return row.get("base") or row["method"]


def kind(row: Mapping[str, Any]) -> str:
    base, method = row.get("base"), row["method"]
    if base is None or method == base:
        return "plain"
    if method.startswith("None"):
        return "opponent"
    return "corrected" if method.startswith(f"{base}+") else "variant"


def family_colours(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    families = dict.fromkeys(family(row) for row in results)
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(families)}


def label_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str], avoid: Sequence[np.ndarray]
) -> None:
    """Write each name beside its point, at the place that covers least of points, lines, other names and edges.

    ``avoid`` holds the lines as arrays ``[2, 2]`` of their ends (x, y).
    """
    if not points:
        return
    axes.autoscale_view()
    renderer = axes.figure.canvas.get_renderer()
    frame = np.array(axes.get_window_extent(renderer).extents)
    point_size = DPI / 72
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = _around(np.array(list(pixels.values())), 6 * point_size)
    for ends in avoid:
        start, stop = axes.transData.transform(ends)
        along = start + np.linspace(0, 1, 40)[:, None] * (stop - start)
        taken = np.concatenate([taken, _around(along, 2 * point_size)])
    for name in sorted(points, key=lambda key: -pixels[key][0]):
        label = axes.annotate(
            name,
            points[name],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=colours[name],
            # A dollar sign in a method's name is not mathematics.
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.5, "alpha": 0.6, "shrinkB": 4},
            zorder=4,
        )
        # Text's own extent: an annotation's would include its leader line.
        size = Text.get_window_extent(label, renderer).size
        trials = []
        for offset in _PLACES:
            box = _label_box(pixels[name] + point_size * np.array(offset), size, offset)
            outside = size.prod() - _shared_area(box, frame)
            # A name that stands nearer to another point than to its own would be read as the other's.
            gaps = {other: _gap(box, pixel) for other, pixel in pixels.items()}
            misread = sum(gap < gaps[name] + 2 * point_size for other, gap in gaps.items() if other != name)
            cost = _shared_area(box, taken) + 10 * outside + 3 * np.hypot(*offset) + 80 * misread
            trials.append((float(cost), offset, box))
        _, offset, box = min(trials, key=lambda trial: trial[0])
        label.set_position(offset)
        label.set(**dict(zip(("horizontalalignment", "verticalalignment"), _alignment(offset), strict=True)))
        label.arrow_patch.set_visible(float(np.hypot(*offset)) > 20)
        taken = np.vstack([taken, box])


def _alignment(offset: tuple[float, float]) -> tuple[str, str]:
    x, y = offset
    return "center" if x == 0 else "left" if x > 0 else "right", "bottom" if y > 4 else "top" if y < -4 else "center"


def _label_box(anchor: np.ndarray, size: np.ndarray, offset: tuple[float, float]) -> np.ndarray:
    """Left, bottom, right, top in pixels of a label of that size, as a ``[4]`` array."""
    shares = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
    corner = anchor - size * [shares[side] for side in _alignment(offset)]
    return np.concatenate([corner, corner + size])


def _around(centres: np.ndarray, half: float) -> np.ndarray:
    """Squares around ``[N, 2]`` centres, as ``[N, 4]``."""
    return np.hstack([centres - half, centres + half])


def _gap(box: np.ndarray, point: np.ndarray) -> float:
    return float(np.hypot(*np.maximum(0.0, np.maximum(box[:2] - point, point - box[2:]))))


def _shared_area(box: np.ndarray, others: np.ndarray) -> float:
    """Area that a ``[4]`` box shares with each of the ``[N, 4]`` or ``[4]`` others, summed."""
    sides = np.minimum(box[2:], others[..., 2:]) - np.maximum(box[:2], others[..., :2])
    return float(np.maximum(sides, 0.0).prod(axis=-1).sum())


def log_ticks(axes: Axes, low: float, high: float) -> None:
    """Number a logarithmic y axis at 1, 2 and 5, or at powers of ten only when it spans several of them."""
    wide = high > 500 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the software tag the bytes depend on the data alone.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
