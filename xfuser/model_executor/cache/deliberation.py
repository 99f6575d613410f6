"""From what was measured to a plan: one exchange, then the same decision on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.distributed.statistics import SumExchange
from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection import build_reviewer
from xfuser.model_executor.cache.adacorrection.offset import (
    DRIFT,
    ROW,
    OffsetRow,
    OffsetScore,
    drift_sums,
)
from xfuser.model_executor.cache.approximation import ORDERS, history_length
from xfuser.model_executor.cache.measurement import Sampler, sample_tokens
from xfuser.model_executor.cache.memory import BranchMemory
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.policies import Policy
from xfuser.model_executor.cache.review import Observation, Review, StepContext
from xfuser.model_executor.cache.state import Active, Branch, Pending
from xfuser.model_executor.cache.statistics import Statistics, StepRecord
from xfuser.model_executor.cache.steps import Call


class Deliberation:
    """Measures what is evaluated, tells it to the deciding group once a step, and plans from the sums alone.

    Row ``run`` (one past the last block) of the statistics belongs to the run of all blocks behind the probed ones,
    whose error is not the sum of its blocks': errors of neighbouring blocks cancel.
    """

    def __init__(self, config: CacheConfig, policy: Policy, exchange: SumExchange, statistics: Statistics) -> None:
        self.run = statistics.blocks
        self.policy, self.exchange, self.statistics = policy, exchange, statistics
        self.reviewer = build_reviewer(config)
        self.order = ORDERS[config.stand_in]
        self.length = history_length(config.stand_in)
        self._score = OffsetScore(config.adacorr_score, config.adacorr_lambda)

    def new_branch(self, units: int) -> Branch:
        """Empty memory and fresh states for one branch of a generation."""
        memory, sampler = BranchMemory(units, self.length), Sampler(self.length, self.order)
        return Branch(memory, self.policy.new_state(), self.reviewer.new_state(units), sampler)

    def measure(self, active: Active, row: int, inputs: Streams, outputs: Streams) -> None:
        """Keep a sample of what was just evaluated, for its drift and the error of what would have stood in."""
        active.branch.sampler.collect(row, inputs[0], outputs[0])

    def close(self, active: Active) -> None:
        """Sum up what the step measured; it is told with the next step's exchange.

        Where steps are whole or not, a probed block alone tells nothing that is used.
        """
        if self.reviewer.whole_steps and active.stand_ins:
            active.branch.sampler.abandon()
        measured = active.branch.sampler.close(active.call.step)
        active.branch.pending = Pending(active.record, measured) if measured is not None else None

    def signal(self, active: Active, block: nn.Module, probed: Streams | None) -> torch.Tensor:
        """The base method's sums of this step; ``probed`` are the first block's outputs, where it probes it."""
        state = active.branch.policy_state
        return self.policy.measure(state, block, active.first_arguments, active.first_inputs, probed)

    def decide(self, active: Active, signal: torch.Tensor, probed: Streams | None) -> tuple[StepPlan, Review, bool]:
        """The step's plan, what the reviewer said, and what the base method had proposed."""
        branch, call = active.branch, active.call
        units, probe_units = len(branch.memory.references), self.policy.probe_blocks
        inputs = (active.first_inputs if probed is None else probed)[0]
        reduced = iter(self.exchange.sum(torch.cat(self._told(branch, signal, inputs))))
        sums, drift, unusable, rows = (_take(reduced, n) for n in (len(signal), DRIFT, 1, None))
        self._learn(branch, rows)
        proposal = self.policy.propose(branch.policy_state, sums, call)
        if unusable[0] != 0:
            self.statistics.non_finite += 1
            branch.memory.clear()
            branch.sampler.discard()
            branch.spatial.clear()
        nodes = tuple(branch.memory.nodes(unit) for unit in range(units))
        offset = self._score(*drift, inputs.shape[-1])
        context = StepContext(call, proposal, nodes, self.run, probe_units, offset, self._lag(branch, call))
        review = self.reviewer.review(branch.review_state, context)
        plan = review.plan.with_prefix(probe_units)
        if not all(nodes[probe_units:]):
            plan = StepPlan.whole(units, True)
        evaluated = all(plan.evaluate[probe_units:])
        self.policy.commit(branch.policy_state, proposal if self.reviewer.shadows_base else evaluated)
        return plan, review, proposal

    def tell(self, branch: Branch) -> None:
        """An exchange of its own, for what the last step of a generation measured."""
        if branch.pending is not None:
            self._learn(branch, self.exchange.sum(self._rows(branch, branch.pending.measured.sums.device)))

    def _told(self, branch: Branch, signal: torch.Tensor, inputs: torch.Tensor) -> list[torch.Tensor]:
        drift = torch.zeros(DRIFT, device=signal.device)
        reference = branch.sampler.last_inputs(self.run)
        if reference is not None:
            drift = drift_sums(sample_tokens(inputs)[None], reference)
        unusable = branch.memory.count_unusable(signal.device)
        return [signal, drift, unusable[None], self._rows(branch, signal.device)]

    def _rows(self, branch: Branch, device: torch.device) -> torch.Tensor:
        """The last step's rows of sums, one after the other, zeros for what was not evaluated."""
        if not self.reviewer.measures:
            return torch.zeros(0, device=device)
        told = torch.zeros(self.run + 1, ROW, device=device)
        if branch.pending is not None:
            told[branch.pending.measured.rows] = branch.pending.measured.sums.to(device)
        return told.flatten()

    def _lag(self, branch: Branch, call: Call) -> int:
        last = branch.sampler.last_step(self.run)
        return 0 if last is None else call.step - last

    def _learn(self, branch: Branch, numbers: list[float]) -> None:
        pending, branch.pending = branch.pending, None
        if pending is None or not numbers:
            return
        observations = []
        for block, (lag, order) in zip(pending.measured.rows, pending.measured.notes, strict=True):
            row = OffsetRow(*numbers[block * ROW : (block + 1) * ROW])
            if not row.finite:
                continue
            if order >= 0:
                observations.append(Observation(block, row, lag, order, block == self.run))
                if block != self.run:
                    self._note(branch, pending.record, block, row)
            branch.spatial[block] = row.spatial
        self.reviewer.learn(branch.review_state, observations)

    def _note(self, branch: Branch, record: StepRecord, block: int, row: OffsetRow) -> None:
        sample = branch.sampler.last_inputs(block)
        channels = 1 if sample is None else sample.shape[-1]
        reference_spatial = branch.spatial.get(block, row.spatial)
        record.true[block] = row.error(self.reviewer.error_weight(branch.review_state, block))
        record.offsets[block] = self._score(
            row.tokens, row.drift, row.reference_norm, row.spatial, reference_spatial, channels
        )
        self.statistics.count_prediction(record.predicted[block], record.true[block])


def _take(numbers: Any, count: int | None) -> list[float]:
    """The next ``count`` numbers, or all that are left."""
    return list(numbers) if count is None else [next(numbers) for _ in range(count)]
