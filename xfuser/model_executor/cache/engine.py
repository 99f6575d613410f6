"""The cache engine: attached to a transformer's blocks, it decides at every step which of them run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.distributed.statistics import SumExchange
from xfuser.model_executor.adapters import BoundArguments, ModelDeclaration, Streams
from xfuser.model_executor.cache.adacorrection.blending import BlendReviewer
from xfuser.model_executor.cache.attach import (
    Replacement,
    drop_empty_registry,
    has_registry,
    named_contexts,
    scheduler_calls,
)
from xfuser.model_executor.cache.calibrating import Calibrator
from xfuser.model_executor.cache.calibration import Calibration, describe_model
from xfuser.model_executor.cache.deliberation import Deliberation
from xfuser.model_executor.cache.flops import FlopCount, StepFlops, signature
from xfuser.model_executor.cache.partial import TokenRunner
from xfuser.model_executor.cache.policies import build_policy
from xfuser.model_executor.cache.recorder import Recorder
from xfuser.model_executor.cache.standins import cut_units, stand_in_outputs
from xfuser.model_executor.cache.state import Active, Branch
from xfuser.model_executor.cache.statistics import Statistics, StepRecord
from xfuser.model_executor.cache.steps import BranchKey, Call, StepTracker
from xfuser.model_executor.cache.tokens import TokenChoice


class CacheEngine:
    """Attaches a base method, and AdaCorrection if asked for, to a transformer.

    Made by `apply_cache_on_transformer` and `apply_cache_on_pipeline`. The engine replaces ``forward`` on the
    transformer and on its block instances; weights, hooks and classes stay as they are.
    """

    def __init__(
        self,
        transformer: nn.Module,
        declaration: ModelDeclaration,
        config: CacheConfig,
        exchange: SumExchange | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.transformer, self.declaration, self.config = transformer, declaration, config
        self.blocks = declaration.blocks(transformer)
        self.policy = build_policy(config, declaration, len(self.blocks))
        self.exchange = exchange or SumExchange()
        self.statistics = Statistics(len(self.blocks))
        self.deliberation = Deliberation(config, self.policy, self.exchange, self.statistics, calibration)
        self.calibrator = Calibrator(config, len(self.blocks), calibration, self._describe)
        self.tracker = StepTracker(config.num_steps, declaration.timestep_direction)
        self._branches: dict[BranchKey, Branch] = {}
        self._active: Active | None = None
        self._context: str | None = None
        self._num_steps: int | None = config.num_steps
        self._flops: dict[tuple[Any, ...], StepFlops] = {}
        self._units: list[tuple[int, int]] = []
        self._replacements: list[Replacement] = []
        self._scheduler: Any = None
        self._attach()

    # -- the public calls ---------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What happened since the last reset, in plain types (see `Statistics.summary`)."""
        self._flush()
        config = self.config
        return {
            "method": config.use_cache,
            "adacorrection": config.mode,
            "approximation": config.stand_in,
            "collectives": self.exchange.collectives,
            "calibrated": self.deliberation.calibration is not None,
            "memory_bytes": sum(branch.bytes() for branch in self._branches.values()),
            "rules_off": self._rules_off(),
            **self.statistics.summary(),
        }

    def _rules_off(self) -> list[str]:
        if self._num_steps is not None:
            return []
        return [*self.policy.needs_num_steps, *self.deliberation.reviewer.needs_num_steps]

    def record(self) -> None:
        """From the next generation on, evaluate everything and keep what a calibration is made from."""
        self.calibrator.record()

    def recorded(self) -> Calibration:
        """The calibration from all whole generations since `record`.

        Raises:
            ValueError: There was none.
        """
        return self.calibrator.recorded()

    def _describe(self) -> dict[str, Any]:
        known = describe_model(self.transformer, self.blocks)
        return known if self._scheduler is None else known | {"scheduler": type(self._scheduler).__name__}

    def reset(self) -> None:
        """Forget every remembered activation and every statistic. The next call starts a generation."""
        self.calibrator.settle()
        self._branches.clear()
        self._active = None
        self.tracker.reset()
        self.statistics.reset()

    def remove(self) -> None:
        """Take the engine off again: every attribute is what it was before. `summary` still tells what happened."""
        self._flush()
        while self._replacements:
            self._replacements.pop().undo()
        self._branches.clear()
        self.tracker.reset()
        if not self._had_registry:
            drop_empty_registry(self.transformer)

    def known_flops(self) -> dict[tuple[Any, ...], StepFlops]:
        """What one call costs, by the shapes of its arguments."""
        return dict(self._flops)

    def learn_flops(self, known: dict[tuple[Any, ...], StepFlops] | None) -> None:
        """Take over an earlier engine's count for the same transformer, so that it need not be counted again."""
        self._flops.update(known or {})

    def watch_scheduler(self, scheduler: Any) -> None:
        """Let a scheduler's own calls mark generations and steps."""
        self._scheduler = scheduler
        self._replacements += scheduler_calls(scheduler, self._start_afresh, self.tracker.step_ends)
        self.tracker.watch_scheduler(scheduler)

    # -- attaching ----------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._tokens = TokenRunner.where_needed(self.config, self.declaration, self.blocks)
        self._had_registry = has_registry(self.transformer)
        self._root_arguments = BoundArguments(self.transformer.forward)
        self._block_arguments = [BoundArguments(block.forward) for block in self.blocks]
        self._replacements.append(Replacement(self.transformer, "forward", self._wrap_root))
        if hasattr(self.transformer, "cache_context"):
            wrap = named_contexts(self._note_context)
            self._replacements.append(Replacement(self.transformer, "cache_context", wrap))
        for index, block in enumerate(self.blocks):
            self._replacements.append(Replacement(block, "forward", self._block_wrapper(index)))
        if self._tokens is not None:
            self._replacements += self._tokens.attach()

    def _note_context(self, name: str | None) -> None:
        self._context = name

    def _wrap_root(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run_transformer(original, args, kwargs)

        return forward

    def _block_wrapper(self, index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._active is None:
                    return original(*args, **kwargs)
                return self._run_block(self._active, index, original, args, kwargs)

            return forward

        return wrap

    # -- one call of the transformer ----------------------------------------------------------------------------------

    def _run_transformer(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(self._root_arguments.read(name, args, kwargs) for name in self.declaration.skips_blocks):
            return original(*args, **kwargs)
        sample = self._root_arguments.read("hidden_states", args, kwargs)
        timestep = self._root_arguments.read("timestep", args, kwargs)
        conditioning = [self._root_arguments.read(name, args, kwargs) for name in self.declaration.conditioning]
        call = self.tracker.begin(timestep, sample, self._context, conditioning)
        self._num_steps = call.num_steps
        if call.starts_generation:
            try:
                self._start_generation(args, kwargs)
            except ValueError:
                self._start_afresh()
                raise
        active = self._open(call)
        shapes = signature(args, kwargs)
        try:
            if shapes not in self._flops:
                active.block_flops = [0.0] * len(self.blocks)
                with FlopCount() as self._counter:
                    output = original(*args, **kwargs)
                total = float(self._counter.total) - active.signal_flops - active.recorder_flops
                self._flops[shapes] = StepFlops(tuple(active.block_flops), total, active.signal_flops)
            else:
                output = original(*args, **kwargs)
        except BaseException:
            self._start_afresh()
            raise
        finally:
            self._active = None
        self._close(active, self._flops[shapes])
        return output

    def _start_afresh(self) -> None:
        self._flush()
        self._branches.clear()
        self.tracker.generation_starts()

    def _start_generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._flush()
        self._branches.clear()
        if self.calibrator.before_generation(self._num_steps):
            self.deliberation.use(self.calibrator.calibration)
        self.statistics.start_generation()
        added = any(
            self._root_arguments.read(name, args, kwargs) is not None for name in self.declaration.between_blocks
        )
        reviewer = self.deliberation.reviewer
        by_block = reviewer.blends or self.policy.observes_blocks or reviewer.measures
        by_block = by_block or self.config.stand_in == "linear"
        self._units = cut_units(
            len(self.blocks), self.policy.probe_blocks, one_by_one=added or (by_block and not reviewer.whole_steps)
        )

    def _open(self, call: Call) -> Active:
        if call.branch not in self._branches:
            self._branches[call.branch] = self.deliberation.new_branch(len(self._units))
        record = StepRecord.empty(call.step, len(self.blocks))
        self._active = Active(call, self._branches[call.branch], record)
        self._unit_at = {first: index for index, (first, _) in enumerate(self._units)}
        self._unit_ending = {last: index for index, (_, last) in enumerate(self._units)}
        return self._active

    def _close(self, active: Active, flops: StepFlops) -> None:
        self.statistics.add(active.call.branch, active.record, flops)
        self.deliberation.close(active)
        if active.call.is_last and self.exchange.group is not None:
            self.deliberation.tell(active.branch)

    # -- one block ----------------------------------------------------------------------------------------------------

    def _run_block(
        self, active: Active, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments, recorder = self._block_arguments[index], self.calibrator.recorder
        streams = tuple(arguments.read(name, args, kwargs) for name in self.declaration.streams)
        if index == 0:
            active.first_inputs, active.first_arguments = streams, arguments.named(args, kwargs)
            if recorder is not None:
                self._record_signal(active, recorder)
            if self.policy.probe_blocks == 0:
                self._decide(active, None)
        if index <= active.skip_until:
            return self.declaration.pack(streams)
        if self.policy.observes_blocks:
            self.policy.observe(active.branch.policy_state, index, streams[0], active.call.step)
        unit = self._unit_at.get(index)
        if unit is not None:
            if active.layerwise:
                self._decide_layer(active, unit, streams)
            if unit in active.stand_ins:
                return self.declaration.pack(self._stand_in(active, unit, streams, original, args, kwargs))
            active.unit_inputs = streams
            tokens = active.tokens
            if tokens is not None and self._tokens is not None and self._tokens.ready(active, unit):
                some = self._evaluate_some(active, unit, tokens, streams, original, args, kwargs)
                return self.declaration.pack(some)
        output = self._evaluate(active, index, original, args, kwargs)
        if recorder is not None:
            recorder.collect(active.call.branch, index, streams, self.declaration.unpack(output, streams))
        if self.deliberation.reviewer.measures:
            self._measure(active, index, streams, self.declaration.unpack(output, streams))
        unit = self._unit_ending.get(index)
        if unit is not None:
            output = self._finish_unit(active, unit, output)
        if index == 0 and self.policy.probe_blocks == 1:
            self._decide(active, self.declaration.unpack(output, streams))
        return output

    def _record_signal(self, active: Active, recorder: Recorder) -> None:
        before = 0 if active.block_flops is None else self._counter.total
        recorder.signal(active.call.branch, self.declaration.modulated_input(self.blocks[0], active.first_arguments))
        if active.block_flops is not None:
            active.recorder_flops = float(self._counter.total - before)

    def _evaluate(
        self, active: Active, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before = 0 if active.block_flops is None else self._counter.total
        if self._tokens is None:
            output = original(*args, **kwargs)
        else:
            output = self._tokens.evaluate_all(active, original, args, kwargs)
        if active.block_flops is not None:
            active.block_flops[index] = float(self._counter.total - before)
        return output

    def _stand_in(
        self,
        active: Active,
        unit: int,
        streams: Streams,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Streams:
        if self._tokens is not None and self.config.granularity == "token" and self._tokens.ready(active, unit):
            tokens = self.deliberation.asking_tokens(active, unit, streams)
            if tokens is not None:
                return self._evaluate_some(active, unit, tokens, streams, original, args, kwargs)
        each = active.stand_ins[unit]
        first_block, active.skip_until = self._units[unit][0], self._units[each.last][1]
        for block in range(first_block, active.skip_until + 1):
            active.record.evaluated[block] = 0.0
        return stand_in_outputs(each, streams, active.branch.memory, active.branch.maps)

    def _evaluate_some(
        self,
        active: Active,
        unit: int,
        tokens: TokenChoice,
        streams: Streams,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Streams:
        """The chosen tokens go through the block, the others take what stands in for it."""
        assert self._tokens is not None
        memory, block = active.branch.memory, self._units[unit][0]
        arguments = self._block_arguments[block]
        tokens, fresh = self._tokens.evaluate_some(active, tokens, streams, arguments, original, args, kwargs)
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
            active.record.weights[self._units[unit][0]] = correction.weight
            active.record.offsets[self._units[unit][0]] = correction.score
            outputs = correction.outputs
            output = self.declaration.pack(outputs)
        older = memory.references[unit][0] if memory.usable(unit) else None
        memory.store(unit, step, inputs, outputs)
        if branch.maps is not None and older is not None:
            branch.maps.learn(unit, older, memory.references[unit][0])
        return output

    def _measure(self, active: Active, index: int, inputs: Streams, outputs: Streams) -> None:
        self.deliberation.measure(active, index, inputs, outputs)
        if index == self.policy.probe_blocks:
            active.run_inputs = inputs
        if index == len(self.blocks) - 1 and active.run_inputs and not active.stand_ins:
            self.deliberation.measure(active, self.deliberation.run, active.run_inputs, outputs)

    # -- the decision -------------------------------------------------------------------------------------------------

    def _decide(self, active: Active, probed: Streams | None) -> None:
        before = self._counter.total if active.block_flops is not None else 0
        signal = self.deliberation.signal(active, self.blocks[0], probed)
        if active.block_flops is not None:
            active.signal_flops = float(self._counter.total - before)
        plan, review = self.deliberation.decide(active, signal, probed, forced=self.calibrator.recorder is not None)
        if not active.layerwise:
            active.stand_ins = self.deliberation.stand_ins(active, plan)
        for index, (first, end) in enumerate(self._units):
            for block in range(first, end + 1):
                active.record.predicted[block] = review.predicted[block]
                if not plan.evaluate[index]:
                    active.record.weights[block] = plan.weights[index]

    def _decide_layer(self, active: Active, unit: int, streams: Streams) -> None:
        evaluate, weight = self.deliberation.decide_layer(active, unit, streams[0])
        active.record.weights[unit] = math.nan if evaluate else weight
        if not evaluate:
            active.stand_ins[unit] = self.deliberation.stand_in_of(active, unit)

    def _flush(self) -> None:
        """Take in what the last step measured, where no later step will: one process only, since ranks must agree."""
        if self.exchange.group is not None:
            return
        for branch in self._branches.values():
            self.deliberation.tell(branch)
