"""From what was measured to a plan: one exchange, then the same decision on every rank."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.attention import KeyValueMemory
from xfuser.core.distributed.exchange import SumExchange
from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection.base import Observation, StepContext
from xfuser.model_executor.cache.adacorrection.modes import build_corrector
from xfuser.model_executor.cache.adacorrection.offset import DRIFT, ROW, OffsetRow, OffsetScore, drift_sums
from xfuser.model_executor.cache.approximation import ORDERS, Extrapolation
from xfuser.model_executor.cache.blocks.history import BlockHistory
from xfuser.model_executor.cache.blocks.plan import Plan, Segment, Span
from xfuser.model_executor.cache.blocks.predict import with_coefficients, with_own_coefficients
from xfuser.model_executor.cache.blocks.probe import TokenProbe
from xfuser.model_executor.cache.blocks.state import Branch, CallState, Pending
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice
from xfuser.model_executor.cache.calibration.linear import LinearMap, LinearMaps, maps_in
from xfuser.model_executor.cache.calibration.store import Calibration, FittedWeights
from xfuser.model_executor.cache.policies import Policy
from xfuser.model_executor.cache.statistics import Statistics, StepRecord
from xfuser.model_executor.cache.steps import Call
from xfuser.model_executor.pipefusion import Partition


class StepPlanner:
    """Measures what is evaluated, adds the sums up over the deciding group once a step, and plans from these alone.

    Attributes:
        spans: What is remembered and decided in this generation.
        stack: All blocks behind the probed ones. It is measured by itself (row ``stack_row``, one past the last
            block), since its error is not the sum of its blocks': errors of neighbouring blocks cancel.
    """

    def __init__(
        self,
        config: CacheConfig,
        policy: Policy,
        exchange: SumExchange,
        statistics: Statistics,
        calibration: Calibration | None,
        partition: Partition,
    ) -> None:
        self.stack_row, self.stack = statistics.blocks, Span(policy.probe_blocks, statistics.blocks - 1)
        self.spans: tuple[Span, ...] = ()
        self.partition = partition
        self.config, self.policy, self.exchange, self.statistics = config, policy, exchange, statistics
        self._score = OffsetScore(config.score, config.adacorr_lambda)
        self.use(calibration)

    def use(self, calibration: Calibration | None) -> None:
        """Take over what a calibration knows; without one, nothing is known yet."""
        self.calibration = self.policy.calibration = calibration
        if self.config.predictor == "fitted" and calibration is not None:
            self.approximation: Extrapolation = FittedWeights(calibration, self.policy.probe_blocks)
        else:
            self.approximation = Extrapolation(ORDERS[self.config.predictor])
        self.corrector = build_corrector(self.config, self.approximation)

    def new_branch(self) -> Branch:
        """Make empty memory and fresh states for one branch of a generation."""
        return Branch(
            BlockHistory(len(self.spans), self.approximation.order + 1),
            self.policy.new_state(),
            self.corrector.new_state(len(self.spans)),
            TokenProbe(self.approximation),
            KeyValueMemory(),
            self._new_maps(),
        )

    def _new_maps(self) -> LinearMaps | None:
        if self.config.predictor != "linear":
            return None
        if self.calibration is None:
            return LinearMaps(ranks=self.partition.peers, reduce=self.partition.reduce)
        section = self.calibration.sections.get("linear", {})
        known = {key: LinearMap(matrix=matrix) for key, matrix in maps_in(section).items()}
        return LinearMaps(calibrated=True, maps=known)

    def measure(self, active: CallState, row: int, inputs: Streams, outputs: Streams) -> None:
        """Keep a sample of what was just evaluated, for its drift and the error of what would have stood in."""
        active.branch.probe.collect(row, inputs[0], outputs[0])

    def note(self, active: CallState, row: int) -> None:
        """Another stage has evaluated a row, and measures it."""
        active.branch.probe.note(row, active.first_inputs[0])

    def close(self, active: CallState) -> None:
        """Sum up what the step measured; the sums go with the next step's exchange.

        Where steps are whole or not, a probed block alone tells nothing that is used.
        """
        assert active.plan is not None
        if self.corrector.whole_steps and not all(active.plan.evaluate):
            active.branch.probe.abandon()
        measured = active.branch.probe.close(active.call.step)
        active.branch.pending = Pending(active.record, measured) if measured is not None else None

    def signal(self, active: CallState, block: nn.Module, probed: Streams | None) -> torch.Tensor:
        """The base method's sums of this step; ``probed`` are the first block's outputs, where it probes it."""
        state = active.branch.policy_state
        everywhere = self.policy.observes_blocks or self.policy.watches_modules
        if not (self.partition.stage.is_first or everywhere):
            return torch.zeros(self.policy.signals, device=active.first_inputs[0].device)
        return self.policy.measure(state, block, active.first_arguments, active.first_inputs, probed)

    def plan(self, active: CallState, signal: torch.Tensor, probed: Streams | None, forced: bool) -> Plan:
        """Decide a step, and write down what was decided; ``forced`` evaluates everything, whatever anybody says."""
        branch, call = active.branch, active.call
        inputs = (active.first_inputs if probed is None else probed)[0]
        reduced = iter(self.exchange.sum(torch.cat(self._told(branch, signal, inputs))))
        sums, drift, unusable, rows = (_take(reduced, n) for n in (len(signal), DRIFT, 1, None))
        self._learn(branch, rows)
        proposals = self.policy.propose_blocks(branch.policy_state, sums, call)
        tokens = self.policy.choose_tokens(branch.policy_state, call) if self.corrector.obeys else None
        if unusable[0] != 0:
            self.statistics.non_finite += 1
            branch.forget()
            branch.maps = self._new_maps()
        nodes = tuple(branch.memory.nodes(span.first) for span in self.spans)
        context = StepContext(
            call,
            proposals,
            self.spans,
            nodes,
            self.policy.probe_blocks,
            self._score(*drift, inputs.shape[-1]),
            self._lag(branch, call),
            tuple(branch.probe.last_step(span.first) for span in self.spans),
        )
        plan = self.corrector.plan(branch.corrector_state, context).with_evaluated(context.probed)
        if forced or not all(nodes[context.probed :]):
            plan, tokens = Plan.of(self.spans, True, predicted=plan.predicted), None
        by_block = self.config.sync == "layer" and not forced and all(nodes)
        plan = replace(plan, asked=proposals, by_block=by_block)
        self.exchange.verify(call.step, plan.digest)
        evaluated = all(plan.evaluate[context.probed :])
        proposed = any(share > 0 for share in proposals[context.probed :])
        self.policy.commit(branch.policy_state, proposed if self.corrector.whole_steps else evaluated)
        self._write_down(active.record, plan)
        return self._completed(branch, call.step, plan, tokens)

    def _write_down(self, record: StepRecord, plan: Plan) -> None:
        record.proposed = sum(plan.asked) / len(plan.asked)
        record.predicted[:] = plan.predicted
        for segment in plan.segments:
            if not segment.evaluate:
                for block in segment.span.blocks:
                    record.weights[block] = segment.correction

    def _completed(self, branch: Branch, step: int, plan: Plan, tokens: TokenChoice | None) -> Plan:
        """Add what is predicted from, and which tokens are evaluated."""
        if plan.by_block:  # what is decided block by block is completed there
            return replace(plan, segments=tuple(replace(each, evaluate=True, tokens=tokens) for each in plan.segments))
        merge = not self.policy.observes_blocks or self.corrector.whole_steps
        merge = merge and branch.maps is None and not self.corrector.chooses_tokens
        merge = merge and self.policy.spec.contiguous
        cuts = self.partition.stage.starts()
        plan = with_coefficients(plan, step, branch.memory, self.approximation, self.stack, merge, cuts)
        if tokens is None:
            return plan
        correction = self.corrector.correction(branch.corrector_state)
        return replace(
            plan,
            segments=tuple(
                self._on_tokens(branch, step, replace(each, correction=correction), tokens)
                if each.evaluate and each.span.first >= self.stack.first
                else each
                for each in plan.segments
            ),
        )

    def _on_tokens(self, branch: Branch, step: int, segment: Segment, tokens: TokenChoice) -> Segment:
        """Evaluate a segment on some tokens; the others are predicted."""
        segment = replace(segment, tokens=tokens)
        return with_own_coefficients(segment, step, branch.memory, self.approximation, self.stack)

    def refine(self, active: CallState, segment: Segment, inputs: Streams) -> Segment:
        """Decide a segment anew, now that its inputs are known, where the settings ask for it.

        ``sync="layer"`` exchanges sums for every block; ``granularity="token"`` looks at each token's own drift.
        """
        assert active.plan is not None
        branch, block, refined = active.branch, segment.span.first, segment
        if active.plan.by_block:
            refined = self._decide_block(active, segment, inputs[0])
        if self.corrector.chooses_tokens and not refined.evaluate:
            asked, seen = active.plan.asked[block], branch.memory.references[block][0].inputs
            tokens = self.corrector.choose_tokens(branch.corrector_state, block, asked, inputs, seen)
            refined = replace(refined, tokens=tokens)
        if refined is not segment:
            active.plan = active.plan.with_segment(refined)
        return refined

    def _decide_block(self, active: CallState, segment: Segment, inputs: torch.Tensor) -> Segment:
        """Decide one block from its current input's sums: an exchange of its own (``sync="layer"``)."""
        assert active.plan is not None
        branch, block, asked = active.branch, segment.span.first, active.plan.asked
        own = self.policy.layer_sums(branch.policy_state, block, inputs.device)
        drift = torch.zeros(DRIFT, device=inputs.device)
        reference = branch.probe.last_inputs(block)
        if reference is not None:
            drift = drift_sums(branch.probe.sample(inputs), reference)
        reduced = self.exchange.sum(torch.cat([own, drift]))
        if self.policy.observes_blocks:
            proposal = self.policy.propose_block(branch.policy_state, block, reduced[: len(own)], active.call)
            asked = (*asked[:block], proposal, *asked[block + 1 :])
            active.plan = replace(active.plan, asked=asked)
            active.record.proposed = sum(asked) / len(asked)
        state, nodes = branch.corrector_state, branch.memory.nodes(block)
        score = self._score(*reduced[len(own) :], inputs.shape[-1])
        evaluate = self.corrector.evaluates(state, block, score, nodes, asked[block])
        correction = self.corrector.correction(state)
        active.record.weights[block] = math.nan if evaluate else correction
        tokens = segment.tokens if evaluate else None
        decided = replace(segment, evaluate=evaluate, correction=correction, tokens=tokens)
        memory, step = branch.memory, active.call.step
        return with_own_coefficients(decided, step, memory, self.approximation, self.stack)

    def finish(self, active: CallState, span: Span, inputs: Streams, outputs: Streams) -> Streams:
        """Let the corrector change what an evaluated span hands on."""
        branch, block = active.branch, span.first
        finished = self.corrector.finish(
            branch.corrector_state, block, active.call.step, inputs, outputs, branch.memory, self.exchange.sum
        )
        if self.corrector.exchanges_per_block and not math.isnan(finished.weight):
            active.record.weights[block], active.record.offsets[block] = finished.weight, finished.score
        return finished.outputs

    def tell(self, branch: Branch) -> None:
        """For what the last step of a generation measured, where nobody else has to be asked."""
        if branch.pending is not None:
            self._learn(branch, self.exchange.sum(self._rows(branch, branch.pending.measured.sums.device)))

    def _told(self, branch: Branch, signal: torch.Tensor, inputs: torch.Tensor) -> list[torch.Tensor]:
        drift = torch.zeros(DRIFT, device=signal.device)
        reference = branch.probe.last_inputs(self.stack_row)
        # Every stage has the inputs; one of them counts them.
        if reference is not None and self.partition.stage.is_last:
            drift = drift_sums(branch.probe.sample(inputs), reference)
        unusable = branch.memory.count_unusable(signal.device, branch.others())
        return [signal, drift, unusable[None], self._rows(branch, signal.device)]

    def _rows(self, branch: Branch, device: torch.device) -> torch.Tensor:
        """The last step's rows of sums, one after the other, zeros for what was not evaluated."""
        if not self.corrector.measures:
            return torch.zeros(0, device=device)
        told = torch.zeros(self.stack_row + 1, ROW, device=device)
        if branch.pending is not None:
            told[branch.pending.measured.rows] = branch.pending.measured.sums.to(device)
        return told.flatten()

    def _lag(self, branch: Branch, call: Call) -> int:
        last = branch.probe.last_step(self.stack_row)
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
                reference = branch.probe.last_inputs(block)
                observations.append(
                    Observation(
                        block,
                        row,
                        lag,
                        order,
                        pending.measured.lags[place],
                        branch.spatial.get(block, row.spatial),
                        1 if reference is None else reference.shape[-1],
                        block == self.stack_row,
                    )
                )
                if block != self.stack_row:
                    self._note(branch, pending.record, observations[-1])
            branch.spatial[block] = row.spatial
        self.corrector.learn(branch.corrector_state, observations)

    def _note(self, branch: Branch, record: StepRecord, seen: Observation) -> None:
        block, row = seen.block, seen.row
        record.true[block] = row.error(self.corrector.correction(branch.corrector_state))
        record.offsets[block] = self._score(
            row.tokens, row.drift, row.reference_norm, row.spatial, seen.reference_spatial, seen.channels
        )
        self.statistics.count_prediction(record.predicted[block], record.true[block])


def _take(numbers: Any, count: int | None) -> list[float]:
    """The next ``count`` numbers, or all that are left."""
    return list(numbers) if count is None else [next(numbers) for _ in range(count)]
