"""``mode="blend"``: the published algorithm, exact. It always evaluates, so it is slower than no cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from xfuser.config import CacheConfig
from xfuser.core.distributed.statistics import SumExchange
from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection.correction import blend, blend_sums, correction_weight
from xfuser.model_executor.cache.adacorrection.offset import OffsetScore
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.memory import BranchMemory
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.review import Review, Reviewer, StepContext


@dataclass(frozen=True)
class Correction:
    """One block's blended output, its weight w and its offset score S (NaN where nothing was remembered)."""

    outputs: Streams
    weight: float
    score: float


class BlendReviewer(Reviewer):
    """Evaluates every block and blends it with the remembered activation by the current offset (equations 1 to 5).

    What is remembered for the next step is the blended output. The sums of the current step are needed before the next
    block can run, so every block has an exchange of its own.
    """

    obeys: ClassVar[bool] = False
    blends: ClassVar[bool] = True

    def __init__(self, config: CacheConfig, approximation: Extrapolation) -> None:
        self.config, self.approximation = config, approximation
        self.score = OffsetScore(config.score, config.adacorr_lambda)

    def new_state(self, units: int) -> list[float]:
        """Per unit, the sum of the spatial variation at the step before."""
        return [math.nan] * units

    def review(self, state: Any, context: StepContext) -> Review:
        return Review(StepPlan.whole(context.units, True), (math.nan,) * context.blocks)

    def correct(
        self,
        state: list[float],
        unit: int,
        step: int,
        inputs: Streams,
        fresh: Streams,
        memory: BranchMemory,
        exchange: SumExchange,
    ) -> Correction:
        """Blend one block's fresh output with what is remembered of it."""
        previous = memory.references[unit][0].inputs[0] if memory.usable(unit) else inputs[0]
        tokens, drift, spatial, norm = exchange.sum(blend_sums(inputs[0], previous))
        reference_spatial, state[unit] = state[unit], spatial
        if not memory.usable(unit):
            return Correction(fresh, math.nan, math.nan)
        score = self.score(tokens, drift, norm, spatial, reference_spatial, inputs[0].shape[-1])
        weight = correction_weight(score, self.config.adacorr_gamma)
        if self.config.stand_in == "activation":
            cached = memory.activation(unit)
        else:
            weights = self.approximation.weights(unit, step, memory.nodes(unit), 1.0)
            cached = memory.stand_in(unit, unit, inputs, weights)
        return Correction(blend(cached, fresh, weight), weight, score)
