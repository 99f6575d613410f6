"""``mode="budget"``: a given share of block evaluations, spent where the error estimate asks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.adacorrection.estimate import ErrorEstimate
from xfuser.model_executor.cache.approximation import ORDERS, remainder
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.review import Observation, Review, Reviewer, StepContext


@dataclass
class BudgetState:
    """``spent`` counts unit evaluations; ``phase`` reaches 1 when the next whole step is due."""

    estimate: ErrorEstimate = field(default_factory=ErrorEstimate)
    spent: float = 0.0
    phase: float = 0.0


class BudgetReviewer(Reviewer):
    """Spends a share of all block evaluations on whole steps, and only so much."""

    measures: ClassVar[bool] = True

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.order = ORDERS[config.stand_in]

    def new_state(self, units: int) -> BudgetState:
        return BudgetState()

    def learn(self, state: BudgetState, observations: list[Observation]) -> None:
        state.estimate.observe(observations, 1.0)

    def review(self, state: BudgetState, context: StepContext) -> Review:
        evaluate = context.proposal if self.config.adacorr_budget is None else self._is_due(state, context)
        state.spent += context.units if evaluate else context.probed
        predicted = tuple(self._predict(state, context, unit) for unit in range(context.units))
        return Review(StepPlan.whole(context.units, evaluate), predicted)

    def _is_due(self, state: BudgetState, context: StepContext) -> bool:
        call, whole = context.call, context.units - context.probed
        if call.num_steps is None:
            affordable = self.config.adacorr_budget * context.units - context.probed
            rate = affordable / whole
        else:
            left = call.num_steps - call.step
            total = self.config.adacorr_budget * context.units * call.num_steps
            affordable = (total - state.spent - context.probed * left) / whole
            if call.is_last:
                return affordable >= 0.5
            rate = (affordable - 1) / (left - 1)
        if len(context.nodes[-1]) <= min(self.order, 1):
            return True
        state.phase += rate
        if state.phase < 1 - 1e-9:
            return False
        state.phase -= 1
        return True

    def _predict(self, state: BudgetState, context: StepContext, unit: int) -> float:
        nodes = context.nodes[unit]
        if not nodes:
            return math.nan
        order = min(self.order, len(nodes) - 1)
        return state.estimate.predict(unit, order, remainder(context.call.step, nodes, order))
