"""``mode="gate"``: the published weight, calibrated per layer online; a block is evaluated when it reaches 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection.base import Corrector, Observation, StepContext
from xfuser.model_executor.cache.adacorrection.drift import DriftMonitor, bounded
from xfuser.model_executor.cache.adacorrection.estimate import ErrorEstimate
from xfuser.model_executor.cache.adacorrection.offset import OffsetRow, OffsetScore
from xfuser.model_executor.cache.adacorrection.published.correction import correction_weight
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.blocks.plan import Plan
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice

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


class GateCorrector(Corrector):
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
        self.exchanges_per_block, self.chooses_tokens = config.sync == "layer", config.granularity == "token"
        self.score = OffsetScore(config.score, config.adacorr_lambda)

    def new_state(self, spans: int) -> GateState:
        return GateState(ErrorEstimate(self.approximation.order))

    def learn(self, state: GateState, observations: list[Observation]) -> None:
        weight = state.estimate.weight
        for each in observations:
            score = self.score_of(each.row, each.reference_spatial, each.channels)
            if each.is_stack or each.lag <= 0 or not math.isfinite(score):
                continue
            score = max(score, SMALLEST_SCORE)
            seen = LayerGate(score / each.lag**2, each.row.error(weight) / score)
            known = state.layers.get(each.block, seen)
            state.layers[each.block] = LayerGate(
                MEMORY * known.rate + (1 - MEMORY) * seen.rate,
                MEMORY * known.sensitivity + (1 - MEMORY) * seen.sensitivity,
            )
        state.estimate.observe(observations)

    def correction(self, state: GateState) -> float:
        return state.estimate.weight

    def score_of(self, row: OffsetRow, reference_spatial: float, channels: int) -> float:
        return self.score(row.tokens, row.drift, row.reference_norm, row.spatial, reference_spatial, channels)

    def plan(self, state: GateState, context: StepContext) -> Plan:
        unusual = bounded(state.drift.ratio(context.offset, context.offset_lag) ** 2)
        predicted = tuple(self.predict(state, context, block, unusual) for block in range(context.blocks))
        weights = [self._gate(error, context.proposals[block]) for block, error in enumerate(predicted)]
        return Plan.of(context.spans, (weight >= 1 for weight in weights), state.estimate.weight, predicted)

    def evaluates(self, state: GateState, block: int, score: float, nodes: Sequence[int], asked: float) -> bool:
        gate = state.layers.get(block)
        if gate is None or len(nodes) <= self.approximation.order or not math.isfinite(score):
            return True
        return self._gate(self.config.adacorr_gamma * gate.sensitivity * score, asked) >= 1

    def choose_tokens(
        self, state: GateState, block: int, asked: float, inputs: Streams, seen: Streams
    ) -> TokenChoice | None:
        """Choose the tokens whose own drift asks for evaluation: γ_l·D_i² ≥ 1."""
        drift = torch.linalg.vector_norm(inputs[0] - seen[0], dim=-1, dtype=torch.float32)
        norm = torch.linalg.vector_norm(seen[0], dim=-1, dtype=torch.float32).mean()
        weights = self.token_sensitivity(state, block, asked) * (drift / norm).square()
        choice = TokenChoice.wanted(weights >= 1, weights, sum(stream.shape[1] for stream in inputs[1:]))
        return choice if choice.share > 0 else None

    def predict(self, state: GateState, context: StepContext, block: int, unusual: float) -> float:
        """γ times the error that the block's stand-in would have; NaN where nothing is known."""
        nodes, gate = context.nodes[block], state.layers.get(block)
        last = context.measured[block]
        lag = 0 if last is None else context.call.step - last
        if gate is None or last is None or len(nodes) <= self.approximation.order or lag > LONGEST_LAG:
            return math.nan
        return self.config.adacorr_gamma * gate.sensitivity * gate.rate * lag**2 * unusual

    def token_sensitivity(self, state: GateState, block: int, proposal: float) -> float:
        """γ_l: by how much to multiply a token's own relative squared drift for its correction weight."""
        gate, tolerated = state.layers.get(block), self._tolerated(proposal)
        if gate is None or tolerated <= 0:
            return math.inf
        return self.config.adacorr_gamma * gate.sensitivity / tolerated

    def _gate(self, predicted: float, proposal: float) -> float:
        """The correction weight: 1 evaluates."""
        tolerated = self._tolerated(proposal)
        return 1.0 if tolerated <= 0 else correction_weight(predicted, 1 / tolerated)

    def _tolerated(self, proposal: float) -> float:
        return self.config.tolerance * (1 - 0.5 * proposal)
