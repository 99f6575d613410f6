"""Runs blocks, or what stands in for them, and keeps what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.attention import AttentionContext
from xfuser.core.distributed.statistics import SumExchange
from xfuser.model_executor.adapters import BoundArguments, ModelDeclaration, Streams
from xfuser.model_executor.cache.adacorrection.blending import BlendReviewer
from xfuser.model_executor.cache.attach import Replacement
from xfuser.model_executor.cache.calibrating import Calibrator
from xfuser.model_executor.cache.deliberation import Deliberation
from xfuser.model_executor.cache.partial import TokenRunner
from xfuser.model_executor.cache.policies import Policy
from xfuser.model_executor.cache.standins import stand_in_outputs
from xfuser.model_executor.cache.state import Active, BlockCall
from xfuser.model_executor.cache.tokens import TokenChoice
from xfuser.model_executor.pipefusion import Placement


class Execution:
    """Every block when the model calls it."""

    def __init__(
        self,
        config: CacheConfig,
        declaration: ModelDeclaration,
        blocks: Sequence[nn.Module],
        policy: Policy,
        deliberation: Deliberation,
        calibrator: Calibrator,
        exchange: SumExchange,
        placement: Placement,
        attention: AttentionContext | None,
    ) -> None:
        self.config, self.declaration, self.blocks, self.policy = config, declaration, blocks, policy
        self.deliberation, self.calibrator, self.exchange = deliberation, calibrator, exchange
        self.placement = placement
        self.units: list[tuple[int, int]] = []
        self.tokens = TokenRunner.where_needed(config, declaration, blocks, attention, placement.may_displace)
        self._arguments = [BoundArguments(block.forward) for block in blocks]

    def attach(self) -> list[Replacement]:
        """Wrap the attention modules, where attention sees more than the tokens that a block is run on."""
        return [] if self.tokens is None else self.tokens.attach()

    def start_generation(self, units: list[tuple[int, int]]) -> None:
        """From here on these are the units: first and last block of each."""
        self.units = units
        self._unit_at = {first: index for index, (first, _) in enumerate(units)}
        self._unit_ending = {last: index for index, (_, last) in enumerate(units)}

    def reset(self) -> None:
        """Forget what was counted."""

    def summary(self) -> dict[str, Any]:
        """What this way to run the blocks has to say."""
        return {}

    def streams_of(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """The streams among a block's arguments."""
        return tuple(self._arguments[index].read(name, args, kwargs) for name in self.declaration.streams)

    def run_block(self, active: Active, call: BlockCall) -> Any:
        """What a block returns: its own output, or what stands in for it."""
        index, streams, recorder = call.index, call.streams, self.calibrator.recorder
        if index == 0:
            self._open(active, call)
            if self.policy.probe_blocks == 0:
                self.decide(active, None)
        if index <= active.skip_until:
            return self.declaration.pack(streams)
        if self.policy.observes_blocks:
            self.policy.observe(active.branch.policy_state, index, streams[0], active.call.step)
        unit = self._unit_at.get(index)
        if unit is not None:
            if active.layerwise:
                self._decide_layer(active, unit, streams)
            if unit in active.stand_ins:
                return self.declaration.pack(self._stand_in(active, unit, call))
            active.unit_inputs = streams
            tokens = active.tokens
            if tokens is not None and self.tokens is not None and self.tokens.ready(active, unit):
                return self.declaration.pack(self._evaluate_some(active, unit, tokens, call))
        output = self._evaluate(active, call)
        if recorder is not None:
            recorder.collect(active.call.branch, index, streams, self.declaration.unpack(output, streams))
        if self.deliberation.reviewer.measures:
            self._measure(active, index, streams, self.declaration.unpack(output, streams))
        unit = self._unit_ending.get(index)
        if unit is not None:
            output = self._finish_unit(active, unit, output)
        if index == 0 and self.policy.probe_blocks == 1:
            self.decide(active, self.declaration.unpack(output, streams))
        return output

    def _open(self, active: Active, call: BlockCall) -> None:
        active.first_inputs = call.streams
        active.first_arguments = self._arguments[0].named(call.args, call.kwargs)
        active.branch.sampler.extent = self.placement.extent(call.streams[0])
        recorder = self.calibrator.recorder
        if recorder is not None:
            before = active.counted()
            modulated = self.declaration.modulated_input(self.blocks[0], active.first_arguments)
            recorder.signal(active.call.branch, modulated)
            active.recorder_flops = active.counted() - before

    def _evaluate(self, active: Active, call: BlockCall) -> Any:
        before = active.counted()
        with self.placement.stage.clock("compute"):
            if self.tokens is None:
                output = call.original(*call.args, **call.kwargs)
            else:
                output = self.tokens.evaluate_all(active, call.original, call.args, call.kwargs)
        active.block_flops[call.index] += active.counted() - before
        return output

    def _stand_in(self, active: Active, unit: int, call: BlockCall) -> Streams:
        if self.tokens is not None and self.config.granularity == "token" and self.tokens.ready(active, unit):
            tokens = self.deliberation.asking_tokens(active, unit, call.streams)
            if tokens is not None:
                return self._evaluate_some(active, unit, tokens, call)
        each = active.stand_ins[unit]
        first_block, active.skip_until = self.units[unit][0], self.units[each.last][1]
        for block in range(first_block, active.skip_until + 1):
            active.record.evaluated[block] = 0.0
        return stand_in_outputs(each, call.streams, active.branch.memory, active.branch.maps)

    def _evaluate_some(self, active: Active, unit: int, tokens: TokenChoice, call: BlockCall) -> Streams:
        """The chosen tokens go through the block, the others take what stands in for it."""
        assert self.tokens is not None
        memory, block, streams = active.branch.memory, self.units[unit][0], call.streams
        tokens, fresh = self.tokens.evaluate_some(
            active, tokens, streams, self._arguments[block], call.original, call.args, call.kwargs
        )
        each = self.deliberation.stand_in_of(active, unit)
        standing = stand_in_outputs(each, streams, memory, active.branch.maps)
        active.record.evaluated[block] = tokens.share
        memory.store_some(unit, active.call.step, tokens, streams, standing, fresh, active.branch.maps is None)
        return (tokens.put(standing[0], fresh[0]), *fresh[1:])

    def _finish_unit(self, active: Active, unit: int, output: Any) -> Any:
        branch, step = active.branch, active.call.step
        memory = branch.memory
        inputs, outputs = active.unit_inputs, self.declaration.unpack(output, active.unit_inputs)
        if isinstance(self.deliberation.reviewer, BlendReviewer) and self.calibrator.recorder is None:
            correction = self.deliberation.reviewer.correct(
                branch.review_state, unit, step, inputs, outputs, memory, self.exchange
            )
            active.record.weights[self.units[unit][0]] = correction.weight
            active.record.offsets[self.units[unit][0]] = correction.score
            outputs = correction.outputs
            output = self.declaration.pack(outputs)
        self._remember(active, unit, inputs, outputs)
        return output

    def _remember(self, active: Active, unit: int, inputs: Streams, outputs: Streams) -> None:
        """Keep an evaluated unit's streams; none where another stage keeps them."""
        branch = active.branch
        memory = branch.memory
        older = memory.references[unit][0] if memory.usable(unit) else None
        memory.store(unit, active.call.step, inputs, outputs)
        if branch.maps is not None and older is not None:
            branch.maps.learn(unit, older, memory.references[unit][0])

    def _measure(self, active: Active, index: int, inputs: Streams, outputs: Streams) -> None:
        self.deliberation.measure(active, index, inputs, outputs)
        if index == self.policy.probe_blocks:
            active.run_inputs = inputs
        if index == len(self.blocks) - 1 and active.run_inputs and not active.stand_ins:
            self.deliberation.measure(active, self.deliberation.run, active.run_inputs, outputs)

    # -- the decision -------------------------------------------------------------------------------------------------

    def decide(self, active: Active, probed: Streams | None) -> None:
        """One exchange, and from it the plan of the step."""
        before = active.counted()
        signal = self.deliberation.signal(active, self.blocks[0], probed)
        active.signal_flops = active.counted() - before
        plan, review = self.deliberation.decide(active, signal, probed, forced=self.calibrator.recorder is not None)
        if not active.layerwise:
            active.stand_ins = self.deliberation.stand_ins(active, plan)
        for index, (first, end) in enumerate(self.units):
            for block in range(first, end + 1):
                active.record.predicted[block] = review.predicted[block]
                if not plan.evaluate[index]:
                    active.record.weights[block] = plan.weights[index]

    def _decide_layer(self, active: Active, unit: int, streams: Streams) -> None:
        evaluate, weight = self.deliberation.decide_layer(active, unit, streams[0])
        active.record.weights[unit] = math.nan if evaluate else weight
        if not evaluate:
            active.stand_ins[unit] = self.deliberation.stand_in_of(active, unit)
