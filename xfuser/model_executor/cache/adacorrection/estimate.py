"""What a stand-in's error will be, learned from the errors that evaluations have shown."""

from __future__ import annotations

import math
from statistics import fmean, median

from xfuser.model_executor.cache.review import Observation

# A new observation counts at least this much against everything seen before: the curvature of a trajectory changes.
NEWEST_SHARE = 0.5
# How much of what refreshed layers show in common is believed of layers that were not refreshed.
SHARED_SURPRISE = 0.5
SMALLEST_ERROR = 1e-9


class ErrorEstimate:
    """log ê_l = a_l + log(remainder of the lag).

    The remainder is the interpolation error's own dependence on the lag (`approximation.remainder`); a_l, one level per
    layer and order, is what Proposition 1 of AdaCorrection (arXiv 2602.13357) assumes as a Lipschitz constant and what
    every evaluation measures for free. A layer that has shown nothing yet starts from the layers' median.
    """

    def __init__(self) -> None:
        self._levels: dict[tuple[int, int], float] = {}

    def observe(self, observations: list[Observation], weight: float) -> None:
        """Learn from one step's evaluations; ``weight`` is the correction weight that the stand-ins would have had."""
        surprises: dict[int, list[float]] = {}
        seen = set()
        for each in observations:
            if each.remainder <= 0:
                continue
            key = (each.unit, each.order)
            shown = math.log(max(each.row.error(weight), SMALLEST_ERROR)) - math.log(each.remainder)
            if key in self._levels:
                surprises.setdefault(each.order, []).append(shown - self._levels[key])
                shown = self._levels[key] + NEWEST_SHARE * (shown - self._levels[key])
            self._levels[key] = shown
            seen.add(key)
        for key in self._levels.keys() - seen:
            if key[1] in surprises:
                self._levels[key] += SHARED_SURPRISE * fmean(surprises[key[1]])

    def predict(self, unit: int, order: int, remainder: float) -> float:
        """Expected relative error of the unit's stand-in; NaN while nothing is known of that order."""
        level = self._levels.get((unit, order))
        if level is None:
            known = [value for (_, each), value in self._levels.items() if each == order]
            if not known:
                return math.nan
            level = median(known)
        return math.exp(level) * remainder
