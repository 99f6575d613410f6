"""Each method over a range of its own settings, and what the points of one curve have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmark.outcomes import Run
from benchmark.rows import Correction, Row, rows_of, uncached
from evaluation.report.frontier import frontiers
from xfuser.model_executor.cache.policies import POLICIES

POINTS = 5
RANGE = (0.5, 4.0)  # the first and the last threshold, times the method's own; below, tiny-dit hardly ever hits
UNCACHED = "None"


@dataclass(frozen=True)
class Sweep:
    """The rows of a sweep, and the rows of each curve, by its name, in the order of their settings."""

    rows: list[Row]
    curves: dict[str, list[str]]

    def to_dict(self, left_out: dict[str, str], results: list[dict[str, Any]]) -> dict[str, Any]:
        """What the results file says of it: the points of every curve, the frontiers, why others are left out,
        and the curves of which none is left.
        """
        saved = {row["method"]: row["flops_saved"] for row in results}
        curves = {name: [method for method in methods if method in saved] for name, methods in self.curves.items()}
        if UNCACHED in curves:
            curves[UNCACHED].sort(key=saved.__getitem__)
        drawn = {name: methods for name, methods in curves.items() if methods}
        # A row that failed is told of as a failure.
        empty = [name for name in curves.keys() - drawn.keys() if set(self.curves[name]) & left_out.keys()]
        return {"curves": drawn, "frontier": frontiers(results), "left_out": left_out, "empty": sorted(empty)}


def settings_of(base: str, settings: dict[str, Any], points: int) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of a base method's points: thresholds spaced geometrically around its own, or its own values.

    Raises:
        ValueError: The threshold is 0, which leaves nothing to space.
    """
    sweep = POLICIES[base].sweep
    if sweep is not None:
        dial, values = sweep
        return [(f"{base}@{value:g}", settings | {dial: value}) for value in values]
    if settings["rel_l1_thresh"] == 0:
        raise ValueError("--sweep needs a --cache_ratio_threshold above 0 to space its thresholds around")
    factors = np.geomspace(*RANGE, points) if points > 1 else [1.0]
    thresholds = [float(f"{settings['rel_l1_thresh'] * factor:.3g}") for factor in factors]
    return [(f"{base}@{threshold:g}", settings | {"rel_l1_thresh": threshold}) for threshold in thresholds]


def build_sweep(
    wanted: dict[str, bool], bases: dict[str, dict[str, Any]], correction: Correction, points: int
) -> Sweep:
    """As `build_rows`, each method once a setting. Of the images, only the middle setting's are kept."""
    rows, curves = [uncached()], {UNCACHED: [UNCACHED]}
    for base, corrected in wanted.items():
        named = settings_of(base, bases[base], points)
        kept = (len(named) - 1) // 2
        for index, (name, settings) in enumerate(named):
            for row in rows_of(name, settings, corrected, correction):
                rows.append(replace(row, kept=index == kept))
                curve = UNCACHED if row.fewer_steps else row.method.replace(name, base, 1)
                curves.setdefault(curve, []).append(row.method)
    return Sweep(rows, curves)


def left_out(runs: list[Run]) -> dict[str, str]:
    """Why rows that did not fail are not reported, by their names."""
    return {run.row.method: run.left_out for run in runs if run.left_out is not None and not run.failed}
