"""Runs blocks, or what stands in for them, and keeps what they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.attention import AttentionContext
from xfuser.model_executor.adapters import BoundArguments, ModelSpec, Streams
from xfuser.model_executor.adapters.streams import StreamForm
from xfuser.model_executor.cache.blocks.flops import StepFlops
from xfuser.model_executor.cache.blocks.module_runner import ModuleRunner
from xfuser.model_executor.cache.blocks.plan import Segment, Span
from xfuser.model_executor.cache.blocks.planner import StepPlanner
from xfuser.model_executor.cache.blocks.predict import predict
from xfuser.model_executor.cache.blocks.state import BlockCall, CallState
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice
from xfuser.model_executor.cache.blocks.token_runner import TokenRunner
from xfuser.model_executor.cache.calibration.learning import Calibrator
from xfuser.model_executor.cache.patching import Replacement
from xfuser.model_executor.cache.policies import Policy
from xfuser.model_executor.pipefusion import Partition


class BlockRunner:
    """Every block when the model calls it."""

    def __init__(
        self,
        config: CacheConfig,
        spec: ModelSpec,
        transformer: nn.Module,
        policy: Policy,
        planner: StepPlanner,
        calibrator: Calibrator,
        partition: Partition,
        attention: AttentionContext | None,
    ) -> None:
        self.config, self.spec, self.policy = config, spec, policy
        self.blocks, self.groups = spec.blocks(transformer), spec.groups_of(transformer)
        self.planner, self.calibrator = planner, calibrator
        self.partition = partition
        self.form = StreamForm()
        self.tokens = TokenRunner.where_needed(config, spec, transformer, self.form, attention, partition.may_displace)
        self.modules = ModuleRunner(policy, calibrator, obeys=config.mode is None)
        self._arguments = [BoundArguments(block.forward) for block in self.blocks]

    def attach(self, active: Callable[[], CallState | None]) -> list[Replacement]:
        """Wrap the attention modules, where attention sees more than the tokens that a block is run on, and the modules
        that the base method watches; ``active`` tells the call that runs.
        """
        tokens = [] if self.tokens is None else self.tokens.attach()
        return tokens + self.modules.attach(self.blocks, self.policy.modules, active)

    @property
    def wraps_within(self) -> bool:
        """Whether modules within blocks are wrapped."""
        watches = any(self.policy.modules(index, block) for index, block in enumerate(self.blocks))
        return watches or self.tokens is not None

    def close(self, active: CallState, flops: StepFlops) -> None:
        """Count what was left out within blocks of a call that has ended, by its share of each block's FLOPs."""
        for place in active.modules_kept:
            block, _, _ = self.modules.watched[place]
            if flops.blocks[block] > 0:
                active.record.evaluated[block] -= flops.modules[place] / flops.blocks[block]
        if active.modules_kept:
            active.record.proposed = sum(active.record.evaluated) / len(active.record.evaluated)

    def reset(self) -> None:
        """Forget what was counted."""

    def summary_of(self, runners: Sequence[BlockRunner]) -> dict[str, Any]:
        """What this way to run the blocks has to say, for all denoisers of an engine."""
        return {}

    def streams_of(self, active: CallState, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """The streams among a block's arguments."""
        group = self.groups[index]
        values = [self._arguments[index].read(name, args, kwargs) for name in group.takes]
        return self.form.read(group, values, active.first_inputs)

    def end(self) -> None:
        """Let go of what one call of the transformer needed only."""
        self.form.forget()

    def _packed(self, index: int, streams: Streams) -> Any:
        return self.form.pack(self.groups[index], streams)

    def _unpacked(self, index: int, output: Any, inputs: Streams) -> Streams:
        return self.form.unpack(self.groups[index], output, inputs)

    def run_block(self, active: CallState, call: BlockCall) -> Any:
        """What a block returns: its own output, or what stands in for it."""
        index, streams, recorder = call.index, call.streams, self.calibrator.recorder
        if index == 0:
            self._open(active, call)
            if self.policy.probe_blocks == 0:
                self._plan(active, None)
        segment = None if active.plan is None else active.plan.at(index)
        if segment is not None and not segment.evaluate and index > segment.span.first:
            return self._packed(index, streams)
        if self.policy.observes_blocks:
            self.policy.observe(active.branch.policy_state, index, streams[0], active.call.step)
        if segment is not None and index == segment.span.first:
            segment = self.planner.refine(active, segment, streams)
            if segment.tokens is not None and self.tokens is not None and self.tokens.ready(active, index):
                return self._packed(index, self._evaluate_some(active, segment, segment.tokens, call))
            if not segment.evaluate:
                return self._packed(index, self._predict(active, segment, streams))
        span = self._span_of(index)
        if index == span.first:
            active.span_inputs = streams
        output = self._evaluate(active, call)
        if recorder is not None:
            recorder.collect(active.call.branch, index, streams, self._unpacked(index, output, streams))
        if self.planner.corrector.measures:
            self._measure(active, index, streams, self._unpacked(index, output, streams))
        if index == span.last:
            output = self._finish(active, span, output)
        if index == 0 and self.policy.probe_blocks == 1:
            self._plan(active, self._unpacked(index, output, streams))
        return output

    def _open(self, active: CallState, call: BlockCall) -> None:
        active.first_inputs = call.streams
        active.first_arguments = self._arguments[0].named(call.args, call.kwargs)
        active.branch.probe.extent = self.partition.extent
        recorder = self.calibrator.recorder
        if recorder is not None:
            before = active.counted()
            recorder.opens(active.call.branch, self.blocks[0], active.first_arguments)
            active.recorder_flops = active.counted() - before

    def _evaluate(self, active: CallState, call: BlockCall) -> Any:
        before = active.counted()
        with self.partition.stage.clock("compute"):
            if self.tokens is None:
                output = call.original(*call.args, **call.kwargs)
            else:
                output = self.tokens.evaluate_all(active, call.original, call.args, call.kwargs)
        active.block_flops[call.index] += active.counted() - before
        return output

    def _span_of(self, block: int) -> Span:
        """The span that a block is remembered in; all but the last are single blocks."""
        return self.planner.spans[min(block, len(self.planner.spans) - 1)]

    def _predict(self, active: CallState, segment: Segment, streams: Streams) -> Streams:
        for block in segment.span.blocks:
            active.record.evaluated[block] = 0.0
        return predict(segment, streams, active.branch.memory, active.branch.maps)

    def _evaluate_some(self, active: CallState, segment: Segment, tokens: TokenChoice, call: BlockCall) -> Streams:
        """Take the chosen tokens through a block and predict the others."""
        assert self.tokens is not None
        memory, block, streams = active.branch.memory, segment.span.first, call.streams
        tokens, fresh = self.tokens.evaluate_some(
            active, block, tokens, streams, self._arguments[block], call.original, call.args, call.kwargs
        )
        predicted = predict(segment, streams, memory, active.branch.maps)
        active.record.evaluated[block] = tokens.share
        memory.store_some(block, active.call.step, tokens, streams, predicted, fresh, active.branch.maps is None)
        return (tokens.put(predicted[0], fresh[0]), *fresh[1:])

    def _finish(self, active: CallState, span: Span, output: Any) -> Any:
        """Let what an evaluated span hands on be corrected, and remember it."""
        inputs, outputs = active.span_inputs, self._unpacked(span.last, output, active.span_inputs)
        if self.calibrator.recorder is None:
            finished = self.planner.finish(active, span, inputs, outputs)
            if finished is not outputs:
                outputs, output = finished, self._packed(span.last, finished)
        self._remember(active, span.first, inputs, outputs)
        return output

    def _remember(self, active: CallState, block: int, inputs: Streams, outputs: Streams) -> None:
        """Keep an evaluated span's streams; none where another stage keeps them."""
        branch = active.branch
        memory = branch.memory
        older = memory.references[block][0] if memory.usable(block) else None
        memory.store(block, active.call.step, inputs, outputs)
        if branch.maps is not None and older is not None:
            branch.maps.learn(block, older, memory.references[block][0])

    def _measure(self, active: CallState, index: int, inputs: Streams, outputs: Streams) -> None:
        self.planner.measure(active, index, inputs, outputs)
        if index == self.policy.probe_blocks:
            active.stack_inputs = inputs
        if not active.stack_inputs or not all(active.plan.evaluate):
            return
        if outputs[0].shape == active.stack_inputs[0].shape:  # in a UNet, the last such block ends what is measured
            active.stack_outputs = outputs
        if index == len(self.blocks) - 1:
            self.planner.measure(active, self.planner.stack_row, active.stack_inputs, active.stack_outputs)

    def _plan(self, active: CallState, probed: Streams | None) -> None:
        """One exchange, and from it the plan of the step."""
        before = active.counted()
        signal = self.planner.signal(active, self.blocks[0], probed)
        active.signal_flops = active.counted() - before
        active.plan = self.planner.plan(active, signal, probed, forced=self.calibrator.recorder is not None)
