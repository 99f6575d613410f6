"""Which methods no other one beats in both quality and speed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.report.columns import is_finite

# Savings of FLOPs that differ by less count as equal: that much is allowed between rows of the same cost.
TIES = {"speedup": 0.0, "flops_saved": 0.01}


def frontier(points: Mapping[str, tuple[float, float]], tie: float = 0.0) -> list[str]:
    """Names of the points (speed, quality) that no other point beats, fastest first; more is better in both.

    A point is beaten by one that is better in one and at least as good in the other; speeds that differ by no more
    than ``tie`` are as good as each other.
    """

    def beaten(name: str) -> bool:
        speed, quality = points[name]
        return any(
            (other_quality > quality and other_speed >= speed - tie)
            or (other_quality == quality and other_speed > speed + tie)
            for other_speed, other_quality in points.values()
        )

    return sorted((name for name in points if not beaten(name)), key=lambda name: -points[name][0])


def frontiers(results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The frontiers of PSNR against measured speed and against saved FLOPs, by the field that is the speed.

    The uncached row, to which all others are compared, has the best quality there is.
    """
    return {
        speed: frontier(
            {
                row["method"]: (float(row[speed]), quality(row))
                for row in results
                if is_finite(row.get(speed)) and not math.isnan(quality(row))
            },
            tie,
        )
        for speed, tie in TIES.items()
    }


def quality(row: Mapping[str, Any]) -> float:
    """A row's PSNR in dB: infinite for the uncached one, NaN where none was measured."""
    value = (row.get("psnr") or {}).get("value")
    if value is None:
        return math.inf if row.get("base") is None else math.nan
    return float(value)
