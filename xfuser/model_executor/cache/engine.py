"""The cache engine: attached to a transformer's blocks, it decides at every step which of them run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.distributed.statistics import SumExchange
from xfuser.model_executor.adapters import BoundArguments, ModelDeclaration, Streams
from xfuser.model_executor.cache.adacorrection import build_reviewer
from xfuser.model_executor.cache.adacorrection.blending import BlendReviewer
from xfuser.model_executor.cache.adacorrection.offset import ROW, OffsetRow, Sample, offset_sums, sample_tokens
from xfuser.model_executor.cache.approximation import ORDERS, extrapolation_weights, history_length, remainder
from xfuser.model_executor.cache.attach import Replacement, named_contexts
from xfuser.model_executor.cache.flops import FlopCount
from xfuser.model_executor.cache.memory import BranchMemory
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.policies import build_policy
from xfuser.model_executor.cache.review import Observation, Review, StepContext
from xfuser.model_executor.cache.statistics import Statistics, StepRecord
from xfuser.model_executor.cache.steps import BranchKey, Call, StepTracker

TOKEN_STRIDE = 4  # statistics look at every fourth token


@dataclass
class Branch:
    """Everything that is remembered of one conditioning branch of one generation."""

    memory: BranchMemory
    policy_state: Any
    review_state: Any
    pending: Pending | None = None
    samples: dict[int, deque[tuple[int, Sample]]] = field(default_factory=dict)


@dataclass
class Pending:
    """What the last step measured and has not told yet: one row of sums per measured unit."""

    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    notes: dict[int, tuple[float, int]] = field(default_factory=dict)
    record: StepRecord | None = None


@dataclass
class Active:
    """One call of the transformer, while it runs."""

    call: Call
    branch: Branch
    record: StepRecord
    pending: Pending
    decided: bool = False
    review: Review | None = None
    first_arguments: Mapping[str, Any] = field(default_factory=dict)
    first_inputs: Streams = ()
    unit_inputs: Streams = ()
    run_inputs: Streams = ()
    stand_ins: dict[int, tuple[int, tuple[float, ...]]] = field(default_factory=dict)
    skip_until: int = -1
    block_flops: list[float] | None = None


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
    ) -> None:
        self.transformer, self.declaration, self.config = transformer, declaration, config
        self.blocks = declaration.blocks(transformer)
        self.policy = build_policy(config, declaration)
        self.reviewer = build_reviewer(config)
        self.exchange = exchange or SumExchange()
        self.statistics = Statistics(len(self.blocks))
        self.tracker = StepTracker(config.num_steps, declaration.timestep_direction)
        self._order = ORDERS[config.stand_in]
        self._length = history_length(config.stand_in)
        self._branches: dict[BranchKey, Branch] = {}
        self._active: Active | None = None
        self._context: str | None = None
        self._flops: dict[tuple[Any, ...], tuple[list[float], float]] = {}
        self._units: list[tuple[int, int]] = []
        self._replacements: list[Replacement] = []
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
            "memory_bytes": sum(branch.memory.bytes() for branch in self._branches.values()),
            **self.statistics.summary(),
        }

    def reset(self) -> None:
        """Forget every remembered activation and every statistic. The next call starts a generation."""
        self._branches.clear()
        self._active = None
        self.tracker.reset()
        self.statistics.reset()

    def remove(self) -> None:
        """Take the engine off again: every attribute is what it was before."""
        while self._replacements:
            self._replacements.pop().undo()
        self.reset()

    def known_flops(self) -> dict[tuple[Any, ...], tuple[list[float], float]]:
        """FLOPs of each block and of the whole transformer, by the input's shape, dtype and device."""
        return dict(self._flops)

    def learn_flops(self, known: dict[tuple[Any, ...], tuple[list[float], float]] | None) -> None:
        """Take over an earlier engine's count for the same transformer, so that it need not be counted again."""
        self._flops.update(known or {})

    def watch_scheduler(self, scheduler: Any) -> None:
        """Let a scheduler's own calls mark generations and steps."""

        def wrap_set_timesteps(original: Callable[..., Any]) -> Callable[..., Any]:
            def set_timesteps(*args: Any, **kwargs: Any) -> Any:
                self._start_afresh()
                return original(*args, **kwargs)

            return set_timesteps

        def wrap_step(original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                self.tracker.step_ends()
                return original(*args, **kwargs)

            return step

        self._replacements.append(Replacement(scheduler, "set_timesteps", wrap_set_timesteps))
        self._replacements.append(Replacement(scheduler, "step", wrap_step))
        self.tracker.watch_scheduler(scheduler)

    # -- attaching ----------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._root_arguments = BoundArguments(self.transformer.forward)
        self._block_arguments = [BoundArguments(block.forward) for block in self.blocks]
        self._replacements.append(Replacement(self.transformer, "forward", self._wrap_root))
        if hasattr(self.transformer, "cache_context"):
            wrap = named_contexts(self.transformer, self._note_context)
            self._replacements.append(Replacement(self.transformer, "cache_context", wrap))
        for index, block in enumerate(self.blocks):
            self._replacements.append(Replacement(block, "forward", self._block_wrapper(index)))

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
        sample = self._root_arguments.read("hidden_states", args, kwargs)
        timestep = self._root_arguments.read("timestep", args, kwargs)
        call = self.tracker.begin(timestep, sample, self._context)
        if call.starts_generation:
            self._start_generation(args, kwargs)
        active = self._open(call)
        signature = (tuple(sample.shape), sample.dtype, str(sample.device))
        try:
            if signature not in self._flops:
                active.block_flops = [0.0] * len(self.blocks)
                with FlopCount() as self._counter:
                    output = original(*args, **kwargs)
                self._flops[signature] = (active.block_flops, float(self._counter.total))
            else:
                output = original(*args, **kwargs)
        except BaseException:
            self._start_afresh()
            raise
        finally:
            self._active = None
        self._close(active, *self._flops[signature])
        return output

    def _start_afresh(self) -> None:
        self._flush()
        self._branches.clear()
        self.tracker.generation_starts()

    def _start_generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._flush()
        self._branches.clear()
        self.statistics.start_generation()
        added = any(
            self._root_arguments.read(name, args, kwargs) is not None for name in self.declaration.between_blocks
        )
        self._units = self._cut(one_by_one=added or self.reviewer.measures or self.reviewer.blends)

    def _cut(self, one_by_one: bool) -> list[tuple[int, int]]:
        """First and last block of every unit: each block, or the probed ones and the whole rest."""
        count, probed = len(self.blocks), self.policy.probe_blocks
        if one_by_one:
            return [(index, index) for index in range(count)]
        units = [(index, index) for index in range(min(probed, count))]
        return units + ([(probed, count - 1)] if probed < count else [])

    def _open(self, call: Call) -> Active:
        if call.branch not in self._branches:
            units = len(self._units)
            self._branches[call.branch] = Branch(
                BranchMemory(units, self._length), self.policy.new_state(), self.reviewer.new_state(units)
            )
        record = StepRecord.empty(call.step, len(self.blocks))
        self._active = Active(call, self._branches[call.branch], record, Pending(record=record))
        self._unit_at = {first: index for index, (first, _) in enumerate(self._units)}
        self._unit_ending = {last: index for index, (_, last) in enumerate(self._units)}
        return self._active

    def _close(self, active: Active, block_flops: list[float], total_flops: float) -> None:
        self.statistics.add(active.call.branch, active.record, block_flops, total_flops)
        active.branch.pending = active.pending if active.pending.rows else None
        if active.call.is_last and self.exchange.group is not None:
            self._learn(active.branch, self.exchange.sum(self._packed(active.branch.pending)))

    # -- one block ----------------------------------------------------------------------------------------------------

    def _run_block(
        self, active: Active, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments = self._block_arguments[index]
        streams = tuple(arguments.read(name, args, kwargs) for name in self.declaration.streams)
        if index == 0:
            active.first_inputs, active.first_arguments = streams, arguments.named(args, kwargs)
            if self.policy.probe_blocks == 0:
                self._decide(active, None)
        if index <= active.skip_until:
            return self.declaration.pack(streams)
        unit = self._unit_at.get(index)
        if unit is not None:
            if unit in active.stand_ins:
                return self.declaration.pack(self._stand_in(active, unit, streams))
            active.unit_inputs = streams
            if unit == self.policy.probe_blocks:
                active.run_inputs = streams
        output = self._evaluate(active, index, original, args, kwargs)
        unit = self._unit_ending.get(index)
        if unit is not None:
            output = self._finish_unit(active, unit, output)
        if index == 0 and self.policy.probe_blocks == 1:
            self._decide(active, self.declaration.unpack(output))
        return output

    def _evaluate(
        self, active: Active, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if active.block_flops is None:
            return original(*args, **kwargs)
        before = self._counter.total
        output = original(*args, **kwargs)
        active.block_flops[index] = float(self._counter.total - before)
        return output

    def _stand_in(self, active: Active, unit: int, streams: Streams) -> Streams:
        last, weights = active.stand_ins[unit]
        first_block, last_block = self._units[unit][0], self._units[last][1]
        active.skip_until = last_block
        for block in range(first_block, last_block + 1):
            active.record.evaluated[block] = False
        return active.branch.memory.stand_in(unit, last, streams, weights)

    def _finish_unit(self, active: Active, unit: int, output: Any) -> Any:
        memory, step = active.branch.memory, active.call.step
        inputs, outputs = active.unit_inputs, self.declaration.unpack(output)
        if isinstance(self.reviewer, BlendReviewer):
            correction = self.reviewer.correct(
                active.branch.review_state, unit, step, inputs, outputs, memory, self.exchange, self._order
            )
            active.record.weights[self._units[unit][0]] = correction.weight
            active.record.offsets[self._units[unit][0]] = correction.score
            outputs = correction.outputs
            output = self.declaration.pack(outputs)
        memory.store(unit, step, inputs, outputs)
        if self.reviewer.measures:
            self._measure(active, unit, inputs, outputs)
            if unit == len(self._units) - 1 and active.run_inputs and not active.stand_ins:
                self._measure(active, len(self._units), active.run_inputs, outputs)
        return output

    def _measure(self, active: Active, row: int, inputs: Streams, outputs: Streams) -> None:
        """Sums of what was just evaluated: drift since its reference, and the error of what would have stood in."""
        step, history = active.call.step, active.branch.samples.setdefault(row, deque(maxlen=self._length))
        sample = sample_tokens(inputs[0], outputs[0], TOKEN_STRIDE)
        nodes = [node for node, _ in history]
        weights = extrapolation_weights(step, nodes, self._order) if nodes else ()
        active.pending.rows[row] = offset_sums(sample, [earlier for _, earlier in history], weights)
        order = min(self._order, len(nodes) - 1)
        active.pending.notes[row] = (remainder(step, nodes, order) if nodes else 0.0, order)
        history.appendleft((step, sample))

    # -- the decision -------------------------------------------------------------------------------------------------

    def _decide(self, active: Active, probed: Streams | None) -> None:
        branch, call, units = active.branch, active.call, len(self._units)
        active.decided = True
        signal = self.policy.measure(
            branch.policy_state, self.blocks[0], active.first_arguments, active.first_inputs, probed
        )
        unusable = sum(not torch.isfinite(total) for total in branch.memory.finite_sums())
        packed = torch.cat((signal.double(), signal.new_tensor([float(unusable)], dtype=torch.float64)))
        reduced = self.exchange.sum(torch.cat((packed.cpu(), self._packed(branch.pending))))
        size = self.policy.signal_size
        self._learn(branch, reduced[size + 1 :])
        proposal = self.policy.propose(branch.policy_state, reduced[:size], call)
        active.record.proposed = proposal
        if not math.isfinite(reduced[size]) or reduced[size] > 0:
            self.statistics.non_finite += 1
            branch.memory.clear()
            branch.samples.clear()
        probed_units = self.policy.probe_blocks
        nodes = tuple(branch.memory.nodes(unit) for unit in range(units))
        context = StepContext(call, proposal, nodes, probed_units)
        review = self.reviewer.review(branch.review_state, context)
        plan = review.plan.with_prefix(probed_units)
        if not all(nodes[probed_units:]):
            plan = StepPlan.whole(units, True)
        active.review = review
        self._adopt(active, plan, review.predicted)

    def _adopt(self, active: Active, plan: StepPlan, predicted: tuple[float, ...]) -> None:
        """Turn a plan into stand-ins: neighbours that share nodes and weight become one run."""
        memory = active.branch.memory
        unit = 0
        while unit < len(plan.evaluate):
            last = unit
            if not plan.evaluate[unit]:
                while (
                    last + 1 < len(plan.evaluate)
                    and not plan.evaluate[last + 1]
                    and plan.weights[last + 1] == plan.weights[unit]
                    and memory.linked(last)
                ):
                    last += 1
                weights = extrapolation_weights(active.call.step, memory.nodes(unit), self._order, plan.weights[unit])
                active.stand_ins[unit] = (last, weights)
            unit = last + 1
        self.policy.commit(active.branch.policy_state, all(plan.evaluate[self.policy.probe_blocks :]))
        for index, (first, end) in enumerate(self._units):
            for block in range(first, end + 1):
                active.record.predicted[block] = predicted[index]
                if not plan.evaluate[index]:
                    active.record.weights[block] = plan.weights[index]

    def _packed(self, pending: Pending | None) -> torch.Tensor:
        if not self.reviewer.measures:
            return torch.zeros(0, dtype=torch.float64)
        table = torch.zeros((len(self._units) + 1, ROW), dtype=torch.float64)
        if pending is not None:
            measured = torch.stack(list(pending.rows.values())).double().cpu()
            table[list(pending.rows)] = measured
        return table.flatten()

    def _learn(self, branch: Branch, numbers: list[float]) -> None:
        pending, branch.pending = branch.pending, None
        if pending is None or not numbers:
            return
        observations = []
        for unit, (lag, order) in pending.notes.items():
            row = OffsetRow(*numbers[unit * ROW : (unit + 1) * ROW])
            if order < 0 or not row.finite:
                continue
            observations.append(Observation(unit, row, lag, order))
            if unit < len(self._units):
                self._note(branch, pending.record, unit, row)
        self.reviewer.learn(branch.review_state, observations)

    def _note(self, branch: Branch, record: StepRecord | None, unit: int, row: OffsetRow) -> None:
        assert record is not None
        true = row.error(self.reviewer.error_weight(branch.review_state, unit))
        for block in range(self._units[unit][0], self._units[unit][1] + 1):
            record.true[block] = true
            record.offsets[block] = row.relative_drift
            self.statistics.count_prediction(record.predicted[block], true)

    def _flush(self) -> None:
        """Take in what the last step measured, where no later step will: one process only, since ranks must agree."""
        if self.exchange.group is not None:
            return
        for branch in self._branches.values():
            if branch.pending is not None:
                self._learn(branch, self.exchange.sum(self._packed(branch.pending)))
