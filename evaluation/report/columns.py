"""The columns of a benchmark's results, shared by the HTML report and the terminal table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DASH = "–"
AGAINST_UNCACHED = ("psnr", "psnr_worst_tenth", "ssim", "fid_vs_uncached")


@dataclass(frozen=True)
class Cell:
    """One formatted table cell.

    Attributes:
        value: The number as text, or a dash when it was not measured.
        low: Lower end of its interval as text, or None when there is no interval.
        high: Upper end of its interval as text, or None when there is no interval.
    """

    value: str
    low: str | None = None
    high: str | None = None


@dataclass(frozen=True)
class Column:
    """How one field of a result row is titled, explained and formatted.

    Attributes:
        key: Name of the field in the row.
        title: Column heading.
        meaning: Plain-language explanation of one or two sentences.
        scale: Factor from the stored number to the shown one (100 for a fraction shown as a percentage).
        digits: Decimal places.
        suffix: Text directly after the number.
        positive: Whether the field is no less than 0, but for chance: then it is shown where its interval leaves 0 out.
    """

    key: str
    title: str
    meaning: str
    scale: float = 1.0
    digits: int = 2
    suffix: str = ""
    positive: bool = False

    def cell(self, row: Mapping[str, Any]) -> Cell:
        """Format this column's entry of one result or comparison row.

        Args:
            row: A row of the document. The field may be a number, ``{"value", "low", "high"}`` or None.

        Returns:
            The formatted cell; a dash when the field is missing, None, not a number, not to be told from noise, or a
            comparison with the uncached images of a cache that never hit, whose images they are.

        Raises:
            TypeError: The field holds neither a number nor a mapping.
        """
        entry = row.get(self.key)
        if row.get("inactive") and self.key in AGAINST_UNCACHED:
            return Cell(DASH)
        if self.positive and not told_from_noise(entry):
            return Cell(DASH)
        if not isinstance(entry, Mapping):
            return Cell(self.number(entry))
        low, high = entry.get("low"), entry.get("high")
        value = self.number(entry.get("value"))
        if value == DASH or not (is_finite(low) and is_finite(high)):
            return Cell(value)
        return Cell(value, self.number(low), self.number(high))

    def number(self, value: float | None) -> str:
        """Format one number in this column's unit, without its interval."""
        if value is None or math.isnan(value):
            return DASH
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        shown = value * self.scale
        # Three-digit scores carry no meaning in the second decimal and would push the table past the terminal's edge.
        digits = min(self.digits, 1) if abs(shown) >= 100 else self.digits
        return f"{shown:.{digits}f}{self.suffix}"


def is_finite(value: float | None) -> bool:
    """Whether ``value`` is a number that can be drawn or shown (neither None, NaN nor infinite)."""
    return value is not None and math.isfinite(value)


def told_from_noise(entry: object) -> bool:
    """Whether a measured ``{"value", "low", "high"}`` that cannot truly be negative has an interval above 0."""
    low = entry.get("low") if isinstance(entry, Mapping) else None
    return is_finite(low) and low > 0


RESULT_COLUMNS: tuple[Column, ...] = (
    Column("speedup", "Speedup", "How many times faster than the same sampler without any cache.", suffix="×"),
    Column("images_per_second", "Images/s", "Finished images a second on the machine described above."),
    Column(
        "hit_rate",
        "Hit rate",
        "Share of block evaluations that were answered from the cache instead of being computed.",
        scale=100,
        digits=1,
        suffix="%",
    ),
    Column(
        "flops_saved",
        "FLOPs saved",
        "Share of the network's arithmetic that was skipped. It bounds the speedup: the bookkeeping is not free.",
        scale=100,
        digits=1,
        suffix="%",
    ),
    Column(
        "psnr",
        "PSNR",
        "Closeness to the uncached image made from the same noise, in decibels. Higher is closer; six decibels more "
        "is about half the error.",
    ),
    Column(
        "psnr_worst_tenth",
        "Worst tenth",
        "Mean PSNR of the tenth of the images that lost most: a mean over all hides what a cache spoils now and then.",
        digits=1,
    ),
    Column(
        "ssim",
        "SSIM",
        "Structural likeness to the uncached image from the same noise. One means identical.",
        digits=4,
    ),
    Column(
        "fid",
        "FID",
        "Distance between the generated images and real ones as sets, in a feature space. Lower is better.",
    ),
    Column(
        "fid_vs_uncached",
        "Fréchet vs uncached",
        "Fréchet distance to the uncached sampler's images: only the damage done by the cache. Lower is better.",
    ),
    Column(
        "kid",
        "KID ×10³",
        "Another distance to real images, without the bias that FID has on few of them, times one thousand. Lower is "
        "better. A dash: too few images to tell it from zero.",
        scale=1000,
        positive=True,
    ),
    Column(
        "class_accuracy",
        "Class accuracy",
        "Share of images that a separate classifier recognises as the class that was asked for.",
        scale=100,
        digits=1,
        suffix="%",
    ),
)

COMPARISON_COLUMNS: tuple[Column, ...] = (
    Column("psnr_difference", "PSNR difference", "Decibels gained over the other method; above zero is better."),
    Column(
        "fid_vs_uncached_ratio",
        "Fréchet vs uncached, ratio",
        "This method's distance over the other's; below one is better.",
        digits=3,
        suffix="×",
    ),
    Column(
        "images_per_second_ratio",
        "Images/s, ratio",
        "This method's throughput over the other's; above one is faster.",
        digits=3,
        suffix="×",
    ),
)


def psnr_verdict(comparison: Mapping[str, Any]) -> str:
    """Say in words what the interval of a comparison's PSNR difference allows to conclude.

    Args:
        comparison: A row of the document's ``comparisons``.

    Returns:
        "closer to uncached", "further from uncached", "no clear difference", or a dash when nothing was measured.
    """
    difference = comparison.get("psnr_difference")
    if not difference or not (is_finite(difference.get("low")) and is_finite(difference.get("high"))):
        return DASH
    if difference["low"] > 0:
        return "closer to uncached"
    return "further from uncached" if difference["high"] < 0 else "no clear difference"
