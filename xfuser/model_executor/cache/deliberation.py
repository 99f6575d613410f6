"""From what was measured to a plan: one exchange, then the same decision on every rank."""

from __future__ import annotations

from collections import deque
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
    offset_sums,
    sample_tokens,
)
from xfuser.model_executor.cache.approximation import ORDERS, extrapolation_weights, history_length, remainder
from xfuser.model_executor.cache.memory import BranchMemory
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.policies import Policy
from xfuser.model_executor.cache.review import Observation, Review, StepContext
from xfuser.model_executor.cache.state import Active, Branch
from xfuser.model_executor.cache.statistics import Statistics, StepRecord
from xfuser.model_executor.cache.steps import Call

TOKEN_STRIDE = 4  # statistics look at every fourth token


class Deliberation:
    """Measures what is evaluated, tells it to the deciding group once a step, and plans from the sums alone.

    Row ``units`` (one past the last unit) of the statistics belongs to the run of all units behind the probed ones,
    whose error is not the sum of its units': errors of neighbouring blocks cancel.
    """

    def __init__(self, config: CacheConfig, policy: Policy, exchange: SumExchange, statistics: Statistics) -> None:
        self.policy, self.exchange, self.statistics = policy, exchange, statistics
        self.reviewer = build_reviewer(config)
        self.order = ORDERS[config.stand_in]
        self.length = history_length(config.stand_in)
        self._score = OffsetScore(config.adacorr_score, config.adacorr_lambda)

    def new_branch(self, units: int) -> Branch:
        """Empty memory and fresh states for one branch of a generation."""
        return Branch(BranchMemory(units, self.length), self.policy.new_state(), self.reviewer.new_state(units))

    def measure(self, active: Active, row: int, inputs: Streams, outputs: Streams) -> None:
        """Keep the sums of what was just evaluated: its drift, and the error of what would have stood in."""
        step, history = active.call.step, active.branch.samples.setdefault(row, deque(maxlen=self.length))
        sample = sample_tokens(inputs[0], outputs[0], TOKEN_STRIDE)
        nodes = [node for node, _ in history]
        lower = extrapolation_weights(step, nodes, self.order, 0.0) if nodes else ()
        full = extrapolation_weights(step, nodes, self.order) if nodes else ()
        active.pending.rows[row] = offset_sums(sample, [earlier for _, earlier in history], lower, full)
        order = min(self.order, len(nodes) - 1)
        active.pending.notes[row] = (remainder(step, nodes, order) if nodes else 0.0, order)
        history.appendleft((step, sample))

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
            branch.samples.clear()
            branch.spatial.clear()
        nodes = tuple(branch.memory.nodes(unit) for unit in range(units))
        offset = self._score(*drift, inputs.shape[-1])
        review = self.reviewer.review(
            branch.review_state, StepContext(call, proposal, nodes, probe_units, offset, self._lag(branch, call))
        )
        plan = review.plan.with_prefix(probe_units)
        if not all(nodes[probe_units:]):
            plan = StepPlan.whole(units, True)
        evaluated = all(plan.evaluate[probe_units:])
        self.policy.commit(branch.policy_state, proposal if self.reviewer.shadows_base else evaluated)
        return plan, review, proposal

    def tell(self, branch: Branch) -> None:
        """An exchange of its own, for what the last step of a generation measured."""
        if branch.pending is not None:
            device = next(iter(branch.pending.rows.values())).device
            self._learn(branch, self.exchange.sum(self._rows(branch, device)))

    def _told(self, branch: Branch, signal: torch.Tensor, inputs: torch.Tensor) -> list[torch.Tensor]:
        history = branch.samples.get(len(branch.memory.references))
        drift = torch.zeros(DRIFT, device=signal.device)
        if self.reviewer.measures and history:
            drift = drift_sums(inputs, history[0][1], TOKEN_STRIDE)
        unusable = branch.memory.count_unusable(signal.device)
        return [signal, drift, unusable[None], self._rows(branch, signal.device)]

    def _rows(self, branch: Branch, device: torch.device) -> torch.Tensor:
        """The last step's rows of sums, one after the other, zeros for what was not evaluated."""
        if not self.reviewer.measures:
            return torch.zeros(0, device=device)
        rows = branch.pending.rows if branch.pending else {}
        nothing = torch.zeros(ROW, device=device)
        count = len(branch.memory.references) + 1
        return torch.cat([rows[row].to(device) if row in rows else nothing for row in range(count)])

    def _lag(self, branch: Branch, call: Call) -> int:
        history = branch.samples.get(len(branch.memory.references))
        return call.step - history[0][0] if history else 0

    def _learn(self, branch: Branch, numbers: list[float]) -> None:
        pending, branch.pending = branch.pending, None
        if pending is None or not numbers:
            return
        observations = []
        for unit, (lag, order) in pending.notes.items():
            row = OffsetRow(*numbers[unit * ROW : (unit + 1) * ROW])
            if not row.finite:
                continue
            if order >= 0:
                observations.append(Observation(unit, row, lag, order, unit == len(branch.memory.references)))
                if unit < len(branch.memory.references):
                    self._note(branch, pending.record, unit, row)
            branch.spatial[unit] = row.spatial
        self.reviewer.learn(branch.review_state, observations)

    def _note(self, branch: Branch, record: StepRecord, unit: int, row: OffsetRow) -> None:
        channels = branch.samples[unit][0][1].inputs.shape[-1] if unit in branch.samples else 1
        reference_spatial = branch.spatial.get(unit, row.spatial)
        record.true[unit] = row.error(self.reviewer.error_weight(branch.review_state, unit))
        record.offsets[unit] = self._score(
            row.tokens, row.drift, row.reference_norm, row.spatial, reference_spatial, channels
        )
        self.statistics.count_prediction(record.predicted[unit], record.true[unit])


def _take(numbers: Any, count: int | None) -> list[float]:
    """The next ``count`` numbers, or all that are left."""
    return list(numbers) if count is None else [next(numbers) for _ in range(count)]
