"""``mode="budget"``: a given share of block evaluations, spent where the error estimate asks for it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import ClassVar

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.adacorrection.base import Corrector, Observation, StepContext
from xfuser.model_executor.cache.adacorrection.drift import DriftMonitor, bounded
from xfuser.model_executor.cache.adacorrection.estimate import ErrorEstimate
from xfuser.model_executor.cache.adacorrection.schedule import refresh_rates
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.blocks.plan import Plan
from xfuser.model_executor.cache.steps import Call

ROUNDING = 1e-9
RECENT = 3  # proposals of the base method whose distances tell how often it proposes


@dataclass
class BudgetState:
    """``spent`` counts block evaluations, ``proposals`` the steps that the base method asked for (parts of one as
    such), ``latest`` holds the last of these and their sizes. The next whole step is due when ``phase`` reaches 1.
    """

    estimate: ErrorEstimate
    drift: DriftMonitor = field(default_factory=DriftMonitor)
    spent: float = 0.0
    proposals: float = 0.0
    latest: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    phase: float = 0.0


class BudgetCorrector(Corrector):
    """Spends a share of all block evaluations, and only so much, on whole steps.

    The share is `adacorr_budget`, or, where none is named, what the base method would spend alone: its proposals so far
    and, for the steps to come, as many as lately. Whole steps, because the errors of neighbouring blocks cancel while
    all of them are approximated alike, and refreshing one of them breaks that. Each step adds its rate (`schedule`)
    × demand^γ to a phase, where the demand is how unusual the step's offset score is for its lag; a refresh is due when
    the phase reaches 1. What stands in between is corrected with the learned weight (`ErrorEstimate.weight`).
    """

    obeys: ClassVar[bool] = False
    measures: ClassVar[bool] = True
    whole_steps: ClassVar[bool] = True
    needs_num_steps: ClassVar[tuple[str, ...]] = ("the budget is spent more densely at first", "the last step is whole")

    def __init__(self, config: CacheConfig, approximation: Extrapolation) -> None:
        self.config, self.approximation = config, approximation
        self.order = approximation.order

    def new_state(self, spans: int) -> BudgetState:
        return BudgetState(ErrorEstimate(self.order))

    def learn(self, state: BudgetState, observations: list[Observation]) -> None:
        state.estimate.observe(observations)

    def correction(self, state: BudgetState) -> float:
        return state.estimate.weight

    def plan(self, state: BudgetState, context: StepContext) -> Plan:
        asked = context.proposed_share
        if asked > 0:
            state.proposals += asked
            state.latest.append((context.call.step, asked))
        evaluate = self._is_due(state, context)
        state.spent += context.blocks if evaluate else context.probed
        predicted = tuple(self._predict(state, context, block) for block in range(context.blocks))
        return Plan.of(context.spans, evaluate, state.estimate.weight, predicted)

    def _is_due(self, state: BudgetState, context: StepContext) -> bool:
        call, whole = context.call, context.blocks - context.probed
        demand = state.drift.ratio(context.offset, context.offset_lag) ** self.config.adacorr_gamma
        share = self.config.adacorr_budget
        if share is None:
            share = (whole * self._expected_proposals(state, call) + context.probed) / context.blocks
        if whole == 0 or share >= 1 or not context.nodes[-1]:
            return True
        if call.num_steps is None:
            rate = (share * context.blocks - context.probed) / whole
        else:
            left = call.num_steps - call.step
            total = share * context.blocks * call.num_steps
            affordable = (total - state.spent - context.probed * left) / whole
            if call.is_last:
                return affordable >= 0.5
            if affordable - 1 > left - 1.5:  # otherwise the rest of the budget would be left over
                return True
            rate = refresh_rates(call.step, left - 1, call.num_steps, max(affordable - 1, 0.0), share)[0]
        if rate >= 1 - ROUNDING:
            return True
        state.phase += max(rate, 0.0) * bounded(demand)
        if state.phase < 1 - ROUNDING:
            return False
        state.phase -= 1
        return True

    @staticmethod
    def _expected_proposals(state: BudgetState, call: Call) -> float:
        """The base method's proposals a step, over the whole generation or, where its end is unknown, lately."""
        since = call.step - state.latest[-1][0] if state.latest else 0
        gaps = [later - earlier for (earlier, _), (later, _) in pairwise(state.latest)] or [1]
        size = fmean(share for _, share in state.latest) if state.latest else 1.0
        lately = size / max(fmean(gaps), since + 1)
        if call.num_steps is None:
            return lately
        return (state.proposals + lately * (call.num_steps - 1 - call.step)) / call.num_steps

    def _predict(self, state: BudgetState, context: StepContext, block: int) -> float:
        nodes = context.nodes[min(block, context.probed)]
        if not nodes:
            return math.nan
        lag, order = self.approximation.expectation(block, context.call.step, nodes)
        return state.estimate.predict(block, order, lag)
