"""``mode="gate"``: the published weight, calibrated per layer online; a block is evaluated when it reaches 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.adacorrection.correction import correction_weight
from xfuser.model_executor.cache.adacorrection.drift import DriftMonitor, bounded
from xfuser.model_executor.cache.adacorrection.estimate import ErrorEstimate
from xfuser.model_executor.cache.adacorrection.offset import OffsetRow, OffsetScore
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.review import Observation, Review, Reviewer, StepContext

MEMORY = 0.5  # share of the older value in a layer's running means
LONGEST_LAG = 10  # steps; beyond it nothing that was seen tells how the error grows
SMALLEST_SCORE = 1e-12


@dataclass
class LayerGate:
    """What one layer's evaluations showed: score at lag 1, and the error of a stand-in per unit of score."""

    rate: float
    sensitivity: float


@dataclass
class GateState:
    """``estimate`` gives the correction weight of the extrapolation; the gates decide."""

    estimate: ErrorEstimate
    layers: dict[int, LayerGate] = field(default_factory=dict)
    drift: DriftMonitor = field(default_factory=DriftMonitor)


class GateReviewer(Reviewer):
    """w = clip(γ_l·S, 0, 1) per layer (equations 3 and 4 of AdaCorrection, with a relative score by default).

    γ_l = γ × the running mean of e / (tolerance·S), e the true error that the layer's evaluations showed, so that w
    reaches 1 when the expected error reaches the tolerance and one γ serves all models. Between evaluations a layer's
    score is what its last one showed, grown with the square of the lag, as S does while the drift is steady, and
    scaled by how unusual the drift of this step's input is, by a half to twice. A proposal of the base method halves
    what is tolerated.
    """

    obeys: ClassVar[bool] = False
    measures: ClassVar[bool] = True

    def __init__(self, config: CacheConfig, approximation: Extrapolation) -> None:
        self.config, self.approximation = config, approximation
        self.score = OffsetScore(config.score, config.adacorr_lambda)

    def new_state(self, units: int) -> GateState:
        return GateState(ErrorEstimate(self.approximation.order))

    def learn(self, state: GateState, observations: list[Observation]) -> None:
        weight = state.estimate.weight
        for each in observations:
            score = self.score_of(each.row, each.reference_spatial, each.channels)
            if each.is_run or each.lag <= 0 or not math.isfinite(score):
                continue
            score = max(score, SMALLEST_SCORE)
            seen = LayerGate(score / each.lag**2, each.row.error(weight) / score)
            known = state.layers.get(each.block, seen)
            state.layers[each.block] = LayerGate(
                MEMORY * known.rate + (1 - MEMORY) * seen.rate,
                MEMORY * known.sensitivity + (1 - MEMORY) * seen.sensitivity,
            )
        state.estimate.observe(observations)

    def error_weight(self, state: GateState, block: int) -> float:
        return state.estimate.weight

    def score_of(self, row: OffsetRow, reference_spatial: float, channels: int) -> float:
        return self.score(row.tokens, row.drift, row.reference_norm, row.spatial, reference_spatial, channels)

    def review(self, state: GateState, context: StepContext) -> Review:
        unusual = bounded(state.drift.ratio(context.offset, context.offset_lag) ** 2)
        predicted = tuple(self.predict(state, context, unit, unusual) for unit in range(context.units))
        weights = [self._gate(error, context.proposals[unit]) for unit, error in enumerate(predicted)]
        evaluate = tuple(weight >= 1 for weight in weights)
        return Review(StepPlan(evaluate, (state.estimate.weight,) * context.units), predicted)

    def review_layer(self, state: GateState, score: float, unit: int, nodes: Sequence[int], proposal: float) -> bool:
        """Whether to evaluate a block, from its current score (``sync="layer"``)."""
        gate = state.layers.get(unit)
        if gate is None or len(nodes) <= self.approximation.order or not math.isfinite(score):
            return True
        return self._gate(self.config.adacorr_gamma * gate.sensitivity * score, proposal) >= 1

    def predict(self, state: GateState, context: StepContext, unit: int, unusual: float) -> float:
        """γ times the error that the unit's stand-in would have; NaN where nothing is known."""
        nodes, gate = context.nodes[unit], state.layers.get(unit)
        last = context.measured[unit]
        lag = 0 if last is None else context.call.step - last
        if gate is None or last is None or len(nodes) <= self.approximation.order or lag > LONGEST_LAG:
            return math.nan
        return self.config.adacorr_gamma * gate.sensitivity * gate.rate * lag**2 * unusual

    def token_sensitivity(self, state: GateState, unit: int, proposal: float) -> float:
        """γ_l: by how much to multiply a token's own relative squared drift for its correction weight."""
        gate, tolerated = state.layers.get(unit), self._tolerated(proposal)
        if gate is None or tolerated <= 0:
            return math.inf
        return self.config.adacorr_gamma * gate.sensitivity / tolerated

    def _gate(self, predicted: float, proposal: float) -> float:
        """The correction weight: 1 evaluates."""
        tolerated = self._tolerated(proposal)
        return 1.0 if tolerated <= 0 else correction_weight(predicted, 1 / tolerated)

    def _tolerated(self, proposal: float) -> float:
        return self.config.tolerance * (1 - 0.5 * proposal)
