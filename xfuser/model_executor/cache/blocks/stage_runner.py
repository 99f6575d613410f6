"""Runs the blocks of one PipeFusion stage, patch by patch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from xfuser.core.tokens import Streams, TokenView, join, narrow_batch, views
from xfuser.model_executor.adapters.streams import take_spans
from xfuser.model_executor.cache.blocks.plan import Plan, Segment, Span
from xfuser.model_executor.cache.blocks.predict import predict
from xfuser.model_executor.cache.blocks.runner import BlockRunner
from xfuser.model_executor.cache.blocks.state import BlockCall, CallState


class StageRunner(BlockRunner):
    """The blocks of this process's stage, when the model calls the last block.

    The model calls its blocks one after the other on all tokens; a stage has to take patch after patch through all of
    its blocks. So the calls are noted and handed through, and the stage runs when all are known: nothing may happen
    between blocks. Displaced steps run patches of tokens, each of which attends to its own fresh keys and values and
    the others' remembered ones; synchronous steps run groups of images, which is exact.

    Every stage knows the inputs of the run of blocks: they are block 0's, or those of the block behind the probed one,
    which the first stage tells. So where the run is remembered as a whole, the last stage alone remembers it, and what
    stands in for it needs no pipe.
    """

    def reset(self) -> None:
        self.synchronous = self.displaced = self.oldest = 0
        self.steps_by_lag: defaultdict[int, int] = defaultdict(int)

    def summary_of(self, runners: Sequence[BlockRunner]) -> dict[str, Any]:
        stages, patches = len(self.partition.stage.stages), self.partition.patches
        staged = [each for each in runners if isinstance(each, StageRunner)]
        lags: Counter[int] = sum((Counter(each.steps_by_lag) for each in staged), Counter())
        return {
            "pipefusion": {
                "stages": [[each.start, each.stop] for each in self.partition.stage.stages],
                "patches": patches,
                "max_lag": self.partition.max_lag,
                "synchronous_steps": sum(each.synchronous for each in staged),
                "displaced_steps": sum(each.displaced for each in staged),
                "displaced_steps_by_lag": dict(sorted(lags.items())),
                "ideal_efficiency": patches / (patches + stages - 1),
            }
        }

    def run_block(self, active: CallState, call: BlockCall) -> Any:
        if call.index == 0:
            self._open(active, call)
            active.stack_inputs = call.streams
            probed = self._probe(active, call) if self.policy.probe_blocks else None
            self._plan(active, probed)
            active.stack_inputs = probed or call.streams
        active.calls.append(call)
        if call.index < len(self.blocks) - 1:
            return self._packed(call.index, call.streams)
        return self._packed(call.index, self._run_stage(active, call))

    def _probe(self, active: CallState, call: BlockCall) -> Streams:
        """Block 0 on all tokens, on the first stage; its outputs on all of them."""
        stage = self.partition.stage
        if stage.is_first:
            with stage.clock("compute"):
                outputs = self._evaluate_view(active, call, call.streams, TokenView())
        else:
            outputs = tuple(torch.empty_like(stream) for stream in call.streams)
        outputs = tuple(stage.broadcast(stream, 0) for stream in outputs)
        self._keep_probed(active, call.streams, outputs)
        return outputs

    def _run_stage(self, active: CallState, call: BlockCall) -> Streams:
        assert active.plan is not None
        stage, inputs, stack = self.partition.stage, active.stack_inputs, self.planner.spans[-1]
        for segment in active.plan.segments:
            if not segment.evaluate:
                active.record.evaluated[segment.span.first : segment.span.last + 1] = [0.0] * len(segment.span)
        if self._remembers_stack and not active.plan.at(stack.first).evaluate:
            if not stage.is_last:
                return call.streams
            return predict(active.plan.at(stack.first), inputs, active.branch.memory, active.branch.maps)
        seen = self._views(active)
        if self.partition.may_displace:
            active.branch.keys.begin_step(active.call.step, extrapolate=not seen[0].takes_all_tokens)
        boundaries: defaultdict[int, list[Streams]] = defaultdict(list)
        for view in seen:
            streams = view.take(inputs) if stage.is_first else stage.receive(view, inputs)
            with stage.clock("compute"):
                for segment in self._segments(active.plan):
                    streams = self._run_segment(active, segment, streams, view, boundaries)
            boundaries[stage.blocks.stop].append(streams)
            if not stage.is_last:
                stage.send(streams)
        stage.drain()

        @cache
        def whole(block: int) -> Streams:
            return join(boundaries[block], seen)

        self._keep_all(active, whole)
        return whole(stage.blocks.stop) if stage.is_last else call.streams

    @property
    def _remembers_stack(self) -> bool:
        """Whether all blocks behind the probed ones are remembered as a whole."""
        return len(self.planner.spans) < len(self.blocks)

    def _views(self, active: CallState) -> list[TokenView]:
        """The step's patches of tokens, or its groups of images where keys and values are too old or must be fresh."""
        assert active.plan is not None
        evaluated = [each.span for each in active.plan.segments if each.evaluate]
        nodes = [active.branch.memory.nodes(span.first) for span in evaluated if span.first >= self.policy.probe_blocks]
        lags = [active.call.step - each[0] if each else None for each in nodes]
        lag = None if not lags or None in lags else max(each for each in lags if each is not None)
        batch, patches = active.stack_inputs[0].shape[0], self.partition.patches
        if self.partition.displaces(active.call.step, lag):
            self.displaced += 1
            self.steps_by_lag[lag or 0] += 1
            return views(batch, 1, patches)
        self.synchronous += 1
        return views(batch, min(batch, patches), 1)

    def _segments(self, plan: Plan) -> Iterator[Segment]:
        """This stage's share of the plan behind the probed blocks, in order; what is evaluated is so block by block."""
        blocks = self.partition.stage.blocks
        block = max(blocks.start, self.policy.probe_blocks)
        while block < blocks.stop:
            segment = plan.at(block)
            if segment.evaluate:
                segment = replace(segment, span=Span(block, block))
            yield segment
            block = segment.span.last + 1

    def _run_segment(
        self,
        active: CallState,
        segment: Segment,
        streams: Streams,
        view: TokenView,
        boundaries: defaultdict[int, list[Streams]],
    ) -> Streams:
        boundaries[segment.span.first].append(streams)
        if not segment.evaluate:
            return predict(segment, streams, active.branch.memory, active.branch.maps, view.take)
        return self._evaluate_view(active, active.calls[segment.span.first], streams, view)

    def _evaluate_view(self, active: CallState, call: BlockCall, streams: Streams, view: TokenView) -> Streams:
        """One block on a view of the tokens."""
        before = active.counted()
        named = self._arguments[call.index].named(call.args, call.kwargs)
        batch, lengths = call.streams[0].shape[0], [stream.shape[1] for stream in call.streams]
        group = self.groups[call.index]
        if not view.takes_all_tokens:
            spans = [view.span(length) for length in lengths]
            for argument in group.per_token:
                named[argument.name] = take_spans(argument, named.get(argument.name), spans, lengths)
        named = narrow_batch(named, self.spec.per_image, batch, view.images)
        named |= self.form.write(group, streams)
        if self.tokens is None:
            output = call.original(**named)
        else:
            output = self.tokens.evaluate_view(active, call.original, named, view, batch)
        active.block_flops[call.index] += active.counted() - before
        return self._unpacked(call.index, output, streams)

    # -- keeping what was evaluated -----------------------------------------------------------------------------------

    def _keep_all(self, active: CallState, whole: Callable[[int], Streams]) -> None:
        assert active.plan is not None
        stage = self.partition.stage
        for span in self.planner.spans[self.policy.probe_blocks :]:
            first = span.first
            if self._remembers_stack:
                mine = (active.stack_inputs, whole(stage.blocks.stop)) if stage.is_last else ((), ())
                for block in span.blocks:
                    self._show(active, block, whole)
                self._remember(active, first, *mine)
            elif active.plan.at(first).evaluate:
                self._show(active, first, whole)
                mine = (whole(first), whole(first + 1)) if stage.holds(first) else ((), ())
                self._remember(active, first, *mine)
            elif self.policy.observes_blocks and stage.holds(first):
                self.policy.observe(active.branch.policy_state, first, whole(first)[0], active.call.step)
        if self.planner.corrector.measures and all(active.plan.evaluate):
            row = self.planner.stack_row
            if stage.is_last:
                self.planner.measure(active, row, active.stack_inputs, whole(stage.blocks.stop))
            else:
                self.planner.note(active, row)

    def _show(self, active: CallState, block: int, whole: Callable[[int], Streams]) -> None:
        """Let those who watch see an evaluated block; only the stage that holds it has anything to show."""
        if self.partition.stage.holds(block):
            if self.policy.observes_blocks:
                self.policy.observe(active.branch.policy_state, block, whole(block)[0], active.call.step)
            if self.planner.corrector.measures:
                self.planner.measure(active, block, whole(block), whole(block + 1))
        elif self.planner.corrector.measures:
            self.planner.note(active, block)

    def _keep_probed(self, active: CallState, inputs: Streams, outputs: Streams) -> None:
        """Keep block 0, which the first stage has evaluated."""
        if self.planner.corrector.measures:
            if self.partition.stage.is_first:
                self.planner.measure(active, 0, inputs, outputs)
            else:
                self.planner.note(active, 0)
        mine = (inputs, outputs) if self.partition.stage.is_first else ((), ())
        self._remember(active, 0, *mine)
