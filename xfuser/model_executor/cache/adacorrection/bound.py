"""``mode="bound"``: evaluate where the predicted error of the stand-in exceeds the tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.adacorrection.drift import DriftMonitor, bounded
from xfuser.model_executor.cache.adacorrection.estimate import ErrorEstimate
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.review import Observation, Review, Reviewer, StepContext

COVERAGE = 0.95  # share of evaluations whose true error must lie within the predicted one
MARGIN_START = 0.5  # of the logarithm: 1.6 times the expected error
MARGIN_STEP = 0.05
LONGEST_LAG = 10  # steps; beyond it nothing that was seen tells how the error grows


@dataclass
class BoundState:
    """``margin`` is added to the logarithm of every prediction and follows the coverage of those ``predicted`` last."""

    estimate: ErrorEstimate
    margin: float = MARGIN_START
    drift: DriftMonitor = field(default_factory=DriftMonitor)
    predicted: tuple[float, ...] = ()


class BoundReviewer(Reviewer):
    """Keeps every block's stand-in within the tolerance, 95% of the time.

    A block is evaluated when γ·ê·exp(margin), scaled by how unusual this step's drift is (by a half to twice), reaches
    the tolerance. The margin is a running quantile: it rises when a true error exceeds its prediction and falls slowly
    otherwise, so that COVERAGE of them stay within. A proposal of the base method to refresh halves what is tolerated
    in that step: it has seen something.
    """

    obeys: ClassVar[bool] = False
    measures: ClassVar[bool] = True

    def __init__(self, config: CacheConfig, approximation: Extrapolation) -> None:
        self.config, self.approximation = config, approximation
        self.order = approximation.order

    def new_state(self, units: int) -> BoundState:
        return BoundState(ErrorEstimate(self.order))

    def learn(self, state: BoundState, observations: list[Observation]) -> None:
        for each in observations:
            if each.block < len(state.predicted) and math.isfinite(state.predicted[each.block]):
                exceeded = (
                    self.config.adacorr_gamma * each.row.error(state.estimate.weight) > state.predicted[each.block]
                )
                state.margin += MARGIN_STEP * (exceeded - (1 - COVERAGE))
        state.estimate.observe(observations)

    def error_weight(self, state: BoundState, block: int) -> float:
        return state.estimate.weight

    def review(self, state: BoundState, context: StepContext) -> Review:
        unusual = bounded(state.drift.ratio(context.offset, context.offset_lag))
        predicted = tuple(unusual * self._predict(state, context, unit) for unit in range(context.units))
        state.predicted = predicted
        evaluate = tuple(
            not error < self.config.tolerance * (1 - 0.5 * context.proposals[unit])
            for unit, error in enumerate(predicted)
        )
        return Review(StepPlan(evaluate, (state.estimate.weight,) * context.units), predicted)

    def _predict(self, state: BoundState, context: StepContext, unit: int) -> float:
        nodes = context.nodes[unit]
        if len(nodes) <= self.order or context.call.step - nodes[0] > LONGEST_LAG:
            return math.nan
        lag, order = self.approximation.expectation(unit, context.call.step, nodes)
        return self.config.adacorr_gamma * state.estimate.predict(unit, order, lag) * math.exp(state.margin)
