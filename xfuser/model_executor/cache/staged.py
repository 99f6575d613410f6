"""Runs the blocks of one PipeFusion stage, patch by patch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from xfuser.core.shards import Streams, View, join, narrow_batch, views
from xfuser.model_executor.cache.execution import Execution
from xfuser.model_executor.cache.standins import StandIn, stand_in_outputs
from xfuser.model_executor.cache.state import Active, BlockCall


@dataclass(frozen=True)
class Segment:
    """Blocks of this stage that are evaluated, or that one approximation stands in for."""

    blocks: range
    stand_in: StandIn | None = None


class StagedExecution(Execution):
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

    def summary(self) -> dict[str, Any]:
        stages, patches = len(self.placement.stage.stages), self.placement.patches
        return {
            "pipefusion": {
                "stages": [[each.start, each.stop] for each in self.placement.stage.stages],
                "patches": patches,
                "max_lag": self.placement.max_lag,
                "synchronous_steps": self.synchronous,
                "displaced_steps": self.displaced,
                "displaced_steps_by_lag": dict(sorted(self.steps_by_lag.items())),
                "ideal_efficiency": patches / (patches + stages - 1),
            }
        }

    def run_block(self, active: Active, call: BlockCall) -> Any:
        if call.index == 0:
            self._open(active, call)
            active.run_inputs = call.streams
            probed = self._probe(active, call) if self.policy.probe_blocks else None
            self.decide(active, probed)
            active.run_inputs = probed or call.streams
        active.calls.append(call)
        if call.index < len(self.blocks) - 1:
            return self.declaration.pack(call.streams)
        return self.declaration.pack(self._run_stage(active, call))

    def _probe(self, active: Active, call: BlockCall) -> Streams:
        """Block 0 on all tokens, on the first stage; its outputs on all of them."""
        stage = self.placement.stage
        if stage.is_first:
            with stage.clock("compute"):
                outputs = self._evaluate_view(active, call, call.streams, View())
        else:
            outputs = tuple(torch.empty_like(stream) for stream in call.streams)
        outputs = tuple(stage.broadcast(stream, 0) for stream in outputs)
        self._keep(active, 0, (0, 0), call.streams, outputs)
        return outputs

    def _run_stage(self, active: Active, call: BlockCall) -> Streams:
        stage, inputs = self.placement.stage, active.run_inputs
        for unit, (first, last) in enumerate(self.units):
            if not self._is_evaluated(active, unit):
                active.record.evaluated[first : last + 1] = [0.0] * (last + 1 - first)
        run = self._spanning_run()
        if run is not None and run in active.stand_ins:
            if not stage.is_last:
                return call.streams
            return stand_in_outputs(active.stand_ins[run], inputs, active.branch.memory, active.branch.maps)
        seen = self._views(active)
        boundaries: defaultdict[int, list[Streams]] = defaultdict(list)
        for view in seen:
            streams = view.take(inputs) if stage.is_first else stage.receive(view, inputs)
            with stage.clock("compute"):
                for segment in self._segments(active, run):
                    streams = self._run_segment(active, segment, streams, view, boundaries)
            boundaries[stage.blocks.stop].append(streams)
            if not stage.is_last:
                stage.send(streams)
        stage.drain()

        @cache
        def whole(block: int) -> Streams:
            return join(boundaries[block], seen)

        self._keep_all(active, run, whole)
        return whole(stage.blocks.stop) if stage.is_last else call.streams

    def _spanning_run(self) -> int | None:
        """The unit that is all blocks behind the probed ones, where they are remembered as a whole."""
        return len(self.units) - 1 if len(self.units) < len(self.blocks) else None

    def _is_evaluated(self, active: Active, unit: int) -> bool:
        return not any(first <= unit <= each.last for first, each in active.stand_ins.items())

    def _views(self, active: Active) -> list[View]:
        """The step's patches of tokens, or its groups of images where keys and values are too old or must be fresh."""
        evaluated = [
            unit for unit in range(self.policy.probe_blocks, len(self.units)) if self._is_evaluated(active, unit)
        ]
        nodes = [active.branch.memory.nodes(unit) for unit in evaluated]
        lags = [active.call.step - each[0] if each else None for each in nodes]
        lag = None if not lags or None in lags else max(each for each in lags if each is not None)
        batch, patches = active.run_inputs[0].shape[0], self.placement.patches
        if self.placement.displaces(active.call.step, lag):
            self.displaced += 1
            self.steps_by_lag[lag or 0] += 1
            return views(batch, 1, patches)
        self.synchronous += 1
        return views(batch, min(batch, patches), 1)

    def _segments(self, active: Active, run: int | None) -> Iterator[Segment]:
        """This stage's share of the plan, in order."""
        block, stop = max(self.placement.stage.blocks.start, self.policy.probe_blocks), self.placement.stage.blocks.stop
        while block < stop:
            each = None if run is not None else active.stand_ins.get(block)
            end = block + 1 if each is None else each.last + 1
            yield Segment(range(block, end), each)
            block = end

    def _run_segment(
        self,
        active: Active,
        segment: Segment,
        streams: Streams,
        view: View,
        boundaries: defaultdict[int, list[Streams]],
    ) -> Streams:
        boundaries[segment.blocks.start].append(streams)
        if segment.stand_in is not None:
            memory, maps = active.branch.memory, active.branch.maps
            return stand_in_outputs(segment.stand_in, streams, memory, maps, view.take)
        return self._evaluate_view(active, active.calls[segment.blocks.start], streams, view)

    def _evaluate_view(self, active: Active, call: BlockCall, streams: Streams, view: View) -> Streams:
        """One block on a view of the tokens."""
        before = active.counted()
        named = self._arguments[call.index].named(call.args, call.kwargs)
        batch, lengths = call.streams[0].shape[0], [stream.shape[1] for stream in call.streams]
        for name, value in named.items():
            if name in self.declaration.per_token:
                if not view.takes_all_tokens:
                    spans = [view.span(length) for length in lengths]
                    named[name] = self.declaration.take_tokens(value, spans, lengths)
        named = narrow_batch(named, self.declaration.per_image, batch, view.rows)
        named |= dict(zip(self.declaration.streams, streams, strict=True))
        if self.tokens is None:
            output = call.original(**named)
        else:
            output = self.tokens.evaluate_view(active, call.original, named, view, batch)
        active.block_flops[call.index] += active.counted() - before
        return self.declaration.unpack(output, streams)

    # -- keeping what was evaluated -----------------------------------------------------------------------------------

    def _keep_all(self, active: Active, run: int | None, whole: Any) -> None:
        stage, first = self.placement.stage, self.policy.probe_blocks
        for unit in range(first, len(self.units)):
            start, end = self.units[unit]
            if unit == run:
                mine = (active.run_inputs, whole(stage.blocks.stop)) if stage.is_last else ((), ())
                for block in range(start, end + 1):
                    self._show(active, block, whole)
                self._remember(active, unit, *mine)
            elif self._is_evaluated(active, unit):
                self._show(active, start, whole)
                mine = (whole(start), whole(start + 1)) if stage.holds(start) else ((), ())
                self._remember(active, unit, *mine)
            elif self.policy.observes_blocks and stage.holds(start):
                self.policy.observe(active.branch.policy_state, start, whole(start)[0], active.call.step)
        if self.deliberation.reviewer.measures and not active.stand_ins:
            row = self.deliberation.run
            if stage.is_last:
                self.deliberation.measure(active, row, active.run_inputs, whole(stage.blocks.stop))
            else:
                self.deliberation.note(active, row)

    def _show(self, active: Active, block: int, whole: Any) -> None:
        """Let those who watch see an evaluated block; only the stage that holds it has anything to show."""
        if self.placement.stage.holds(block):
            if self.policy.observes_blocks:
                self.policy.observe(active.branch.policy_state, block, whole(block)[0], active.call.step)
            if self.deliberation.reviewer.measures:
                self.deliberation.measure(active, block, whole(block), whole(block + 1))
        elif self.deliberation.reviewer.measures:
            self.deliberation.note(active, block)

    def _keep(self, active: Active, unit: int, blocks: tuple[int, int], inputs: Streams, outputs: Streams) -> None:
        """The probed unit, which the first stage has evaluated."""
        if self.deliberation.reviewer.measures:
            if self.placement.stage.is_first:
                self.deliberation.measure(active, blocks[0], inputs, outputs)
            else:
                self.deliberation.note(active, blocks[0])
        mine = (inputs, outputs) if self.placement.stage.is_first else ((), ())
        self._remember(active, unit, *mine)
