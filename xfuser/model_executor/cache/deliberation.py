"""From what was measured to a plan: one exchange, then the same decision on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.attention import KeyValueMemory
from xfuser.core.distributed.statistics import SumExchange
from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection import build_reviewer
from xfuser.model_executor.cache.adacorrection.gate import GateReviewer
from xfuser.model_executor.cache.adacorrection.offset import (
    DRIFT,
    ROW,
    OffsetRow,
    OffsetScore,
    drift_sums,
)
from xfuser.model_executor.cache.approximation import ORDERS, Extrapolation
from xfuser.model_executor.cache.calibration import Calibration, FittedWeights
from xfuser.model_executor.cache.linear import LinearMap, LinearMaps
from xfuser.model_executor.cache.measurement import Sampler
from xfuser.model_executor.cache.memory import BranchMemory
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.policies import Policy
from xfuser.model_executor.cache.review import Observation, Review, StepContext
from xfuser.model_executor.cache.standins import StandIn, stand_ins
from xfuser.model_executor.cache.state import Active, Branch, Pending
from xfuser.model_executor.cache.statistics import Statistics, StepRecord
from xfuser.model_executor.cache.steps import Call
from xfuser.model_executor.cache.tokens import TokenChoice
from xfuser.model_executor.pipefusion import Placement


class Deliberation:
    """Measures what is evaluated, tells it to the deciding group once a step, and plans from the sums alone.

    Row ``run`` (one past the last block) of the statistics belongs to the run of all blocks behind the probed ones,
    whose error is not the sum of its blocks': errors of neighbouring blocks cancel.
    """

    def __init__(
        self,
        config: CacheConfig,
        policy: Policy,
        exchange: SumExchange,
        statistics: Statistics,
        calibration: Calibration | None,
        placement: Placement,
    ) -> None:
        self.run = statistics.blocks
        self.placement = placement
        self.config, self.policy, self.exchange, self.statistics = config, policy, exchange, statistics
        self._score = OffsetScore(config.score, config.adacorr_lambda)
        self.use(calibration)

    def use(self, calibration: Calibration | None) -> None:
        """Take over what a calibration knows; without one, nothing is known yet."""
        self.calibration = self.policy.calibration = calibration
        if self.config.stand_in == "fitted" and calibration is not None:
            self.approximation: Extrapolation = FittedWeights(calibration, self.policy.probe_blocks)
        else:
            self.approximation = Extrapolation(ORDERS[self.config.stand_in])
        self.reviewer = build_reviewer(self.config, self.approximation)

    def new_branch(self, units: int) -> Branch:
        """Empty memory and fresh states for one branch of a generation."""
        return Branch(
            BranchMemory(units, self.approximation.order + 1),
            self.policy.new_state(),
            self.reviewer.new_state(units),
            Sampler(self.approximation),
            KeyValueMemory(),
            self._new_maps(),
        )

    def _new_maps(self) -> LinearMaps | None:
        if self.config.stand_in != "linear":
            return None
        if self.calibration is None:
            return LinearMaps(ranks=self.placement.peers, reduce=self.placement.reduce)
        known = {key: LinearMap(matrix=matrix) for key, matrix in self.calibration.maps.items()}
        return LinearMaps(calibrated=True, maps=known)

    def measure(self, active: Active, row: int, inputs: Streams, outputs: Streams) -> None:
        """Keep a sample of what was just evaluated, for its drift and the error of what would have stood in."""
        active.branch.sampler.collect(row, inputs[0], outputs[0])

    def note(self, active: Active, row: int) -> None:
        """Another stage has evaluated a row, and measures it."""
        active.branch.sampler.note(row, active.first_inputs[0])

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
        if not (self.placement.stage.is_first or self.policy.observes_blocks):
            return torch.zeros(self.policy.signals, device=active.first_inputs[0].device)
        return self.policy.measure(state, block, active.first_arguments, active.first_inputs, probed)

    @property
    def layerwise(self) -> bool:
        """Whether blocks are decided one by one, from the current step's sums."""
        return self.config.sync == "layer"

    def decide(
        self, active: Active, signal: torch.Tensor, probed: Streams | None, forced: bool
    ) -> tuple[StepPlan, Review]:
        """The step's plan and what the reviewer said; ``forced`` evaluates everything, whatever they say."""
        branch, call = active.branch, active.call
        units, probe_units = len(branch.memory.references), self.policy.probe_blocks
        inputs = (active.first_inputs if probed is None else probed)[0]
        reduced = iter(self.exchange.sum(torch.cat(self._told(branch, signal, inputs))))
        sums, drift, unusable, rows = (_take(reduced, n) for n in (len(signal), DRIFT, 1, None))
        self._learn(branch, rows)
        proposals = self.policy.propose_blocks(branch.policy_state, sums, call)
        active.tokens = self.policy.choose_tokens(branch.policy_state, call) if self.reviewer.obeys else None
        if unusable[0] != 0:
            self.statistics.non_finite += 1
            branch.forget()
            branch.maps = self._new_maps()
        nodes = tuple(branch.memory.nodes(unit) for unit in range(units))
        offset = self._score(*drift, inputs.shape[-1])
        measured = tuple(branch.sampler.last_step(unit) for unit in range(units))
        context = StepContext(call, proposals, nodes, self.run, probe_units, offset, self._lag(branch, call), measured)
        review = self.reviewer.review(branch.review_state, context)
        plan = review.plan.with_prefix(probe_units)
        if forced or not all(nodes[probe_units:]):
            plan, active.tokens = StepPlan.whole(units, True), None
        active.layerwise = self.layerwise and not forced and all(nodes)
        active.proposals, active.record.proposed = proposals, sum(proposals) / len(proposals)
        told = (weight if not evaluate else -1.0 for evaluate, weight in zip(plan.evaluate, plan.weights, strict=True))
        self.exchange.verify(call.step, tuple(told))
        proposed = any(share > 0 for share in proposals[probe_units:])
        evaluated = all(plan.evaluate[probe_units:])
        self.policy.commit(branch.policy_state, proposed if self.reviewer.shadows_base else evaluated)
        return plan, review

    def decide_layer(self, active: Active, unit: int, inputs: torch.Tensor) -> tuple[bool, float]:
        """Whether to evaluate one block, from its current input's sums: an exchange of its own (``sync="layer"``); and
        the correction weight of what would stand in.
        """
        branch = active.branch
        own = self.policy.layer_sums(branch.policy_state, unit, inputs.device)
        drift = torch.zeros(DRIFT, device=inputs.device)
        reference = branch.sampler.last_inputs(unit)
        if reference is not None:
            drift = drift_sums(branch.sampler.sample(inputs), reference)
        reduced = self.exchange.sum(torch.cat([own, drift]))
        proposal = active.proposals[unit]
        if self.policy.observes_blocks:
            proposal = self.policy.propose_block(branch.policy_state, unit, reduced[: len(own)], active.call)
            proposals = (*active.proposals[:unit], proposal, *active.proposals[unit + 1 :])
            active.proposals, active.record.proposed = proposals, sum(proposals) / len(proposals)
        weight = self.reviewer.error_weight(branch.review_state, unit)
        if not isinstance(self.reviewer, GateReviewer):
            return proposal > 0, weight
        score = self._score(*reduced[len(own) :], inputs.shape[-1])
        nodes = branch.memory.nodes(unit)
        return self.reviewer.review_layer(branch.review_state, score, unit, nodes, proposal), weight

    def stand_ins(self, active: Active, plan: StepPlan) -> dict[int, StandIn]:
        """What stands in for the units that the plan does not evaluate."""
        merge = not self.policy.observes_blocks or self.reviewer.whole_steps
        merge = merge and active.branch.maps is None and self.config.granularity == "layer"
        probed, memory = self.policy.probe_blocks, active.branch.memory
        cuts = self.placement.stage.starts()
        return stand_ins(plan, active.call.step, memory, self.approximation, self.run, probed, merge, cuts)

    def stand_in_of(self, active: Active, unit: int) -> StandIn:
        """What stands in for one unit, whatever the plan says."""
        weight = self.reviewer.error_weight(active.branch.review_state, unit)
        nodes = active.branch.memory.nodes(unit)
        return StandIn(unit, unit, self.approximation.weights(unit, active.call.step, nodes, weight))

    def asking_tokens(self, active: Active, unit: int, streams: Streams) -> TokenChoice | None:
        """Tokens of an approximated block whose own drift asks for evaluation: γ_l·D_i² ≥ 1."""
        assert isinstance(self.reviewer, GateReviewer)
        inputs, text = streams[0], sum(stream.shape[1] for stream in streams[1:])
        sensitivity = self.reviewer.token_sensitivity(active.branch.review_state, unit, active.proposals[unit])
        reference = active.branch.memory.references[unit][0].inputs[0]
        drift = torch.linalg.vector_norm(inputs - reference, dim=-1, dtype=torch.float32)
        norm = torch.linalg.vector_norm(reference, dim=-1, dtype=torch.float32).mean()
        weights = sensitivity * (drift / norm).square()
        choice = TokenChoice.wanted(weights >= 1, weights, text)
        return choice if choice.share > 0 else None

    def tell(self, branch: Branch) -> None:
        """For what the last step of a generation measured, where nobody else has to be asked."""
        if branch.pending is not None:
            self._learn(branch, self.exchange.sum(self._rows(branch, branch.pending.measured.sums.device)))

    def _told(self, branch: Branch, signal: torch.Tensor, inputs: torch.Tensor) -> list[torch.Tensor]:
        drift = torch.zeros(DRIFT, device=signal.device)
        reference = branch.sampler.last_inputs(self.run)
        # Every stage has the inputs; one of them counts them.
        if reference is not None and self.placement.stage.is_last:
            drift = drift_sums(branch.sampler.sample(inputs), reference)
        unusable = branch.memory.count_unusable(signal.device, branch.others())
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
        for place, (block, (lag, order)) in enumerate(zip(pending.measured.rows, pending.measured.notes, strict=True)):
            row = OffsetRow(*numbers[block * ROW : (block + 1) * ROW])
            if not row.finite:
                continue
            if order >= 0:
                reference = branch.sampler.last_inputs(block)
                observations.append(
                    Observation(
                        block,
                        row,
                        lag,
                        order,
                        pending.measured.lags[place],
                        branch.spatial.get(block, row.spatial),
                        1 if reference is None else reference.shape[-1],
                        block == self.run,
                    )
                )
                if block != self.run:
                    self._note(branch, pending.record, observations[-1])
            branch.spatial[block] = row.spatial
        self.reviewer.learn(branch.review_state, observations)

    def _note(self, branch: Branch, record: StepRecord, seen: Observation) -> None:
        block, row = seen.block, seen.row
        record.true[block] = row.error(self.reviewer.error_weight(branch.review_state, block))
        record.offsets[block] = self._score(
            row.tokens, row.drift, row.reference_norm, row.spatial, seen.reference_spatial, seen.channels
        )
        self.statistics.count_prediction(record.predicted[block], record.true[block])


def _take(numbers: Any, count: int | None) -> list[float]:
    """The next ``count`` numbers, or all that are left."""
    return list(numbers) if count is None else [next(numbers) for _ in range(count)]
