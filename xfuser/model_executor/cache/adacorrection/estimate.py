"""What a stand-in's error will be, learned from the errors that evaluations have shown."""

from __future__ import annotations

import math
from statistics import fmean, median

from xfuser.model_executor.cache.adacorrection.base import Observation
from xfuser.model_executor.cache.adacorrection.offset import OffsetRow

# A new observation counts at least this much against everything seen before: the curvature of a trajectory changes.
NEWEST_SHARE = 0.5
# How much of what refreshed layers show in common is believed of layers that were not refreshed.
SHARED_SURPRISE = 0.5
SMALLEST_ERROR = 1e-9
WEIGHT_MEMORY = 0.5  # share of the older evaluations in the correction weight
WEIGHT_START = 0.75  # before anything was seen: a full extrapolation from two early steps overshoots


class ErrorEstimate:
    """log ê_l = a_l + log(remainder of the lag).

    The remainder is the interpolation error's own dependence on the lag (`approximation.remainder`); a_l, one level per
    layer and order, is what Proposition 1 of AdaCorrection (arXiv 2602.13357) assumes as a Lipschitz constant and what
    every evaluation measures for free. A layer that has shown nothing yet starts from the layers' median.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._levels: dict[tuple[int, int], float] = {}
        self._weight = WEIGHT_START
        self._evidence = 1.0

    @property
    def weight(self) -> float:
        """The correction weight w: how much of the stand-in's highest term would have been right, 0 to 1.

        The mean, recent evaluations counting more, of each one's least-squares answer min_w Σ‖r − r̂ − w·x‖², x the
        highest term, of the whole run of blocks where it was evaluated as a whole. Every evaluation counts alike: early
        ones move more, but tell less of the later ones. One weight for all layers, so that their stand-ins merge.
        """
        return min(max(self._weight, 0.0), 1.0)

    def observe(self, observations: list[Observation]) -> None:
        """Learn from one step's evaluations."""
        weight = self.weight
        surprises: dict[int, list[float]] = {}
        seen = set()
        for each in observations:
            if each.remainder <= 0 or each.row.output_square <= 0:
                continue
            key = (each.block, each.order)
            shown = math.log(max(each.row.error(weight), SMALLEST_ERROR)) - math.log(each.remainder)
            if key in self._levels:
                surprises.setdefault(each.order, []).append(shown - self._levels[key])
                shown = self._levels[key] + NEWEST_SHARE * (shown - self._levels[key])
            self._levels[key] = shown
            seen.add(key)
        for key in self._levels.keys() - seen:
            if key[1] in surprises:
                self._levels[key] += SHARED_SURPRISE * fmean(surprises[key[1]])
        full = [each for each in observations if each.order == self.order > 0 and each.row.output_square > 0]
        self._learn_weight([each.row for each in full if each.is_stack] or [each.row for each in full])

    def _learn_weight(self, rows: list[OffsetRow]) -> None:
        cross = sum(row.cross / row.output_square for row in rows)
        square = sum(row.highest_square / row.output_square for row in rows)
        if square > 0:
            self._evidence = WEIGHT_MEMORY * self._evidence + 1
            self._weight += (cross / square - self._weight) / self._evidence

    def predict(self, unit: int, order: int, remainder: float) -> float:
        """Expected relative error of the unit's stand-in; NaN while nothing is known of that order."""
        level = self._levels.get((unit, order))
        if level is None:
            known = [value for (_, each), value in self._levels.items() if each == order]
            if not known:
                return math.nan
            level = median(known)
        return math.exp(level) * remainder
