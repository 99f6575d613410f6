"""``mode="blend"``: the published algorithm, exact. It always evaluates, so it is slower than no cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection.base import Corrector, Finished, StepContext
from xfuser.model_executor.cache.adacorrection.offset import OffsetScore
from xfuser.model_executor.cache.adacorrection.published.correction import blend, blend_sums, correction_weight
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.blocks.history import BlockHistory
from xfuser.model_executor.cache.blocks.plan import Plan, Span


class BlendCorrector(Corrector):
    """Evaluates every block and blends it with the remembered activation by the current offset (equations 1 to 5).

    What is remembered for the next step is the blended output. The sums of the current step are needed before the next
    block can run, so every block has an exchange of its own.
    """

    obeys: ClassVar[bool] = False
    exchanges_per_block = True

    def __init__(self, config: CacheConfig, approximation: Extrapolation) -> None:
        self.config, self.approximation = config, approximation
        self.score = OffsetScore(config.score, config.adacorr_lambda)

    def new_state(self, spans: int) -> list[float]:
        """Return, per block, the sum of the spatial variation at the step before."""
        return [math.nan] * spans

    def plan(self, state: list[float], context: StepContext) -> Plan:
        return Plan.of(context.spans, True)

    def finish(
        self,
        state: list[float],
        block: int,
        step: int,
        inputs: Streams,
        outputs: Streams,
        memory: BlockHistory,
        agree: Callable[[torch.Tensor], list[float]],
    ) -> Finished:
        previous = memory.references[block][0].inputs[0] if memory.usable(block) else inputs[0]
        tokens, drift, spatial, norm = agree(blend_sums(inputs[0], previous))
        reference_spatial, state[block] = state[block], spatial
        if not memory.usable(block):
            return Finished(outputs)
        score = self.score(tokens, drift, norm, spatial, reference_spatial, inputs[0].shape[-1])
        weight = correction_weight(score, self.config.adacorr_gamma)
        if self.config.predictor == "activation":
            cached = memory.activation(block)
        else:
            coefficients = self.approximation.weights(block, step, memory.nodes(block), 1.0)
            cached = memory.predict(Span(block, block), inputs, coefficients)
        return Finished(blend(cached, outputs, weight), weight, score)
