"""``mode="bound"``: evaluate where the predicted error of the stand-in exceeds the tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.adacorrection.base import Corrector, Observation, StepContext
from xfuser.model_executor.cache.adacorrection.drift import DriftMonitor, bounded
from xfuser.model_executor.cache.adacorrection.estimate import ErrorEstimate
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.blocks.plan import Plan

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


class BoundCorrector(Corrector):
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

    def new_state(self, spans: int) -> BoundState:
        return BoundState(ErrorEstimate(self.order))

    def learn(self, state: BoundState, observations: list[Observation]) -> None:
        for each in observations:
            if each.block < len(state.predicted) and math.isfinite(state.predicted[each.block]):
                exceeded = (
                    self.config.adacorr_gamma * each.row.error(state.estimate.weight) > state.predicted[each.block]
                )
                state.margin += MARGIN_STEP * (exceeded - (1 - COVERAGE))
        state.estimate.observe(observations)

    def correction(self, state: BoundState) -> float:
        return state.estimate.weight

    def plan(self, state: BoundState, context: StepContext) -> Plan:
        unusual = bounded(state.drift.ratio(context.offset, context.offset_lag))
        predicted = tuple(unusual * self._predict(state, context, block) for block in range(context.blocks))
        state.predicted = predicted
        evaluate = (
            not error < self.config.tolerance * (1 - 0.5 * context.proposals[block])
            for block, error in enumerate(predicted)
        )
        return Plan.of(context.spans, evaluate, state.estimate.weight, predicted)

    def _predict(self, state: BoundState, context: StepContext, block: int) -> float:
        nodes = context.nodes[block]
        if len(nodes) <= self.order or context.call.step - nodes[0] > LONGEST_LAG:
            return math.nan
        lag, order = self.approximation.expectation(block, context.call.step, nodes)
        return self.config.adacorr_gamma * state.estimate.predict(block, order, lag) * math.exp(state.margin)
