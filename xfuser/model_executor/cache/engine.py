"""The cache engine: attached to a transformer's blocks, it decides at every step which of them run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.attention import AttentionContext
from xfuser.core.distributed.exchange import SumExchange
from xfuser.model_executor.adapters import ModelSpec, spec_of
from xfuser.model_executor.cache.adacorrection.trajectory.fingerprint import weights_digest
from xfuser.model_executor.cache.blocks.compiling import check_compiled
from xfuser.model_executor.cache.blocks.flops import FlopCount, StepFlops, signature
from xfuser.model_executor.cache.blocks.parts import Part, check_model, check_one_denoiser
from xfuser.model_executor.cache.blocks.plan import cut
from xfuser.model_executor.cache.blocks.planner import StepPlanner
from xfuser.model_executor.cache.blocks.runner import BlockRunner
from xfuser.model_executor.cache.blocks.stage_runner import StageRunner
from xfuser.model_executor.cache.blocks.state import Branch, CallState
from xfuser.model_executor.cache.calibration.learning import Calibrator
from xfuser.model_executor.cache.calibration.store import Calibration, describe_model
from xfuser.model_executor.cache.following import PipelineFollower
from xfuser.model_executor.cache.foreign import check_no_other_cache, check_not_compiled_whole
from xfuser.model_executor.cache.patching import (
    Replacement,
    check_scheduler_free,
    check_transformer_free,
    scheduler_calls,
)
from xfuser.model_executor.cache.policies import build_policy, with_threshold
from xfuser.model_executor.cache.statistics import Statistics, StepRecord
from xfuser.model_executor.cache.steps import BranchKey, Call, StepTracker
from xfuser.model_executor.pipefusion import Partition, Stage


class CacheEngine:
    """Attaches a base method, and AdaCorrection if asked for, to a denoiser, or to all that a pipeline uses in turn.

    Made by `apply_cache_on_transformer` and `apply_cache_on_pipeline`. The engine replaces ``forward`` on the
    transformer and on its block instances; weights, hooks and classes stay as they are.

    Args:
        transformer: A diffusers denoiser.
        spec: How it is cut into blocks.
        config: The settings.
        exchange: Adds up what the ranks that share an image measure; by default there is one process.
        calibration: What is known of the model.
        partition: This process's images, tokens and blocks; by default all.
        attention: Sees the tokens of other ranks; by default there are none.
        others: Further denoisers of the same pipeline, in the order in which they are used.

    Raises:
        ValueError: The settings do not go with the model. Nothing has been changed then.
    """

    def __init__(
        self,
        transformer: nn.Module,
        spec: ModelSpec,
        config: CacheConfig,
        exchange: SumExchange | None = None,
        calibration: Calibration | None = None,
        partition: Partition | None = None,
        attention: AttentionContext | None = None,
        others: Sequence[nn.Module] = (),
    ) -> None:
        self.exchange = exchange or SumExchange()
        self.paused = False  # calls go through unseen
        self._asked, self._given_partition, self._attention = config, partition, attention
        self._scheduler: Any = None
        self._follower: PipelineFollower | None = None
        self._build([transformer, *others], spec, calibration)
        for part in self.parts:
            check_compiled(part.blocks, part.runner.wraps_within)
        self._attach()

    def _build(self, transformers: Sequence[nn.Module], spec: ModelSpec, calibration: Calibration | None) -> None:
        """Make everything that belongs to one model."""
        check_model(transformers, spec, self._asked)
        transformer = transformers[0]
        config = with_threshold(self._asked, spec, transformer)
        self.transformer, self.spec, self.config = transformer, spec, config
        self.blocks = spec.blocks(transformer)
        self.policy = build_policy(config, spec, len(self.blocks))
        self.statistics = Statistics(len(self.blocks))
        self.partition = self._given_partition or Partition(Stage.alone(len(self.blocks)))
        self.planner = StepPlanner(config, self.policy, self.exchange, self.statistics, calibration, self.partition)
        self.calibrator = Calibrator(config, transformer, spec, calibration, self._describe, self._weights)
        kind = BlockRunner if self.partition.stage.is_alone else StageRunner
        needs = (self.policy, self.planner, self.calibrator, self.partition, self._attention)
        self.parts = [Part(self, each, kind(config, spec, each, *needs)) for each in transformers]
        self.runner = self.parts[0].runner
        for part in self.parts:
            part.runner.reset()
        self.tracker = StepTracker(config.num_steps, spec.timestep_direction)
        self._branches: dict[tuple[int, BranchKey], Branch] = {}
        self.active: CallState | None = None
        self._context: str | None = None
        self._num_steps: int | None = config.num_steps
        self._flops: dict[tuple[Any, ...], StepFlops] = {}
        self._scheduler_marks: list[Replacement] = []

    # -- the public calls ---------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What happened since the last reset, in plain types (see `Statistics.summary`)."""
        self._flush()
        config = self.config
        return {
            "method": config.use_cache,
            "rel_l1_thresh": config.rel_l1_thresh,
            "adacorrection": config.mode,
            "approximation": None if config.use_cache is None else config.predictor,  # nothing has to be stood in for
            "collectives": self.exchange.collectives,
            "calibrated": self.planner.calibration is not None,
            "memory_bytes": sum(branch.bytes() for branch in self._branches.values()),
            "rules_off": self._rules_off(),
            **self.runner.summary_of([part.runner for part in self.parts]),
            **self.statistics.summary(),
        }

    def _rules_off(self) -> list[str]:
        if self._num_steps is not None:
            return []
        return [*self.policy.needs_num_steps, *self.planner.corrector.needs_num_steps]

    def record(self, **settings: Any) -> None:
        """From the next generation on, evaluate everything and keep what a calibration is made from.

        Args:
            **settings: Of single sections, as ``xdit calibrate`` has them.

        Raises:
            TypeError: A setting is not known.
            ValueError: Several ranks share the image, and each sees a part of its tokens, branches or blocks only; or
                there are several denoisers.
        """
        check_one_denoiser([part.transformer for part in self.parts])
        if self.exchange.group is not None:
            raise ValueError(
                "record() sees this rank's part of an image only; calibrate in one process (`xdit calibrate`) and give "
                "every rank the file, as calibration='mine.safetensors'"
            )
        self.calibrator.record(settings)
        self.parts[0].watch(self.calibrator.modules)

    def recorded(self) -> Calibration:
        """The calibration from all whole generations since `record`.

        Raises:
            ValueError: There was none.
        """
        before, self.paused = self.paused, True  # learning may call the transformer
        try:
            return self.calibrator.recorded()
        finally:
            self.paused = before

    def _describe(self) -> dict[str, Any]:
        known = describe_model(self.transformer, self.blocks)
        return known if self._scheduler is None else known | {"scheduler": type(self._scheduler).__name__}

    def _weights(self) -> tuple[str, Any]:
        """What changes with a LoRA, with other weights in place of these, and with their type."""
        return weights_digest(self.transformer), next((each.dtype for each in self.transformer.parameters()), None)

    def reset(self) -> None:
        """Forget every remembered activation and every statistic. The next call starts a generation."""
        self.calibrator.settle()
        self._branches.clear()
        self.active = None
        self.tracker.reset()
        self.statistics.reset()
        for part in self.parts:
            part.runner.reset()

    def remove(self) -> None:
        """Take the engine off again: every attribute is what it was before. `summary` still tells what happened."""
        if self._follower is not None:
            self._follower.undo()
            self._follower = None
        self._detach()

    def known_flops(self) -> dict[tuple[Any, ...], StepFlops]:
        """What one call costs, by the shapes of its arguments."""
        return dict(self._flops)

    def learn_flops(self, known: dict[tuple[Any, ...], StepFlops] | None) -> None:
        """Take over an earlier engine's count for the same transformer, so that it need not be counted again."""
        self._flops.update(known or {})

    # -- attaching ----------------------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        """The scheduler whose calls mark generations and steps; ``None`` where timesteps tell them."""
        return self._scheduler

    def follow_pipeline(self, pipeline: Any) -> None:
        """Let the scheduler that a pipeline has mark generations and steps, and move with what is assigned to it."""
        self._follower = PipelineFollower(pipeline, self)

    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse a scheduler that another engine follows, or with which the calibration was not made (ValueError)."""
        if scheduler is not None:
            check_scheduler_free(scheduler)
        if self._scheduler is not None:
            self.calibrator.check(self.transformer, self.blocks, scheduler)

    def watch_scheduler(self, scheduler: Any) -> None:
        """Let a scheduler's own calls mark generations and steps, and no longer those of the one before.

        Raises:
            ValueError: As for `check_scheduler`; nothing has changed then.
        """
        self.check_scheduler(scheduler)
        if self._scheduler is not None:
            self.calibrator.forget()
        self._leave_scheduler()
        self._start_afresh()
        self._scheduler = scheduler
        self.tracker.watch_scheduler(scheduler)
        if scheduler is not None:
            self._scheduler_marks = scheduler_calls(scheduler, self._start_afresh, self.tracker.step_ends)

    @property
    def transformers(self) -> list[nn.Module]:
        """The denoisers that it is attached to, in the order in which they are used."""
        return [part.transformer for part in self.parts]

    def move_to(self, transformers: Sequence[nn.Module]) -> None:
        """Leave the denoisers for others; statistics begin anew.

        Raises:
            TypeError: One is not supported.
            ValueError: One has an engine already, or the calibration was made with another; nothing has changed then.
        """
        if self._given_partition is not None:
            raise ValueError(
                "the transformer was replaced after it was spread over its ranks; remove(), and parallelize() again"
            )
        spec = spec_of(transformers[0])
        check_model(transformers, spec, self._asked)
        spec.check_return_order(self.config.return_hidden_states_first)
        before, scheduler = self.calibrator, self._scheduler
        for transformer in transformers:
            check_not_compiled_whole(transformer)
            if transformer not in self.transformers:
                check_transformer_free(transformer)
            check_no_other_cache(transformer)
            check_compiled(spec.blocks(transformer), self.runner.wraps_within)
            before.check(transformer, spec.blocks(transformer), scheduler)
        calibration = before.forget()
        self._detach()
        self._build(transformers, spec, calibration)
        if before.records_all:
            self.record(**before.settings)
        self._attach()
        if scheduler is not None:
            self.watch_scheduler(scheduler)

    def _attach(self) -> None:
        for part in self.parts:
            part.attach()

    def _detach(self) -> None:
        self._flush()
        self._leave_scheduler()
        for part in reversed(self.parts):
            part.detach()
        self._branches.clear()
        self.tracker.reset()

    def _leave_scheduler(self) -> None:
        while self._scheduler_marks:
            self._scheduler_marks.pop().undo()
        self._scheduler = None

    def note_context(self, name: str | None) -> None:
        """Remember what the pipeline calls the branch whose call comes."""
        self._context = name

    # -- one call of the transformer ----------------------------------------------------------------------------------

    def run_transformer(
        self, part: Part, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call of a denoiser: its own forward, within which its blocks ask what to do."""
        if self._follower is not None:
            self._follower.follow_scheduler()
        if self.paused or any(part.read(name, args, kwargs) for name in self.spec.skips_blocks):
            return original(*args, **kwargs)
        sample = part.read(self.spec.sample, args, kwargs)
        timestep = part.read(self.spec.timestep, args, kwargs)
        conditioning = [part.read(name, args, kwargs) for name in self.spec.conditioning]
        call = self.tracker.begin(timestep, sample, self._context, conditioning)
        self._num_steps = call.num_steps
        if call.starts_generation:
            try:
                self._start_generation(part, args, kwargs)
            except ValueError:
                self._start_afresh()
                raise
        active = self._open(part, call)
        if self.calibrator.recorder is not None:
            self.calibrator.recorder.called(call.branch, args, kwargs)
        shapes = (self.parts.index(part), *signature(args, kwargs))
        try:
            if shapes not in self._flops:
                with FlopCount() as active.counter:
                    output = original(*args, **kwargs)
                self._flops[shapes] = self._counted(part, active)
            else:
                output = original(*args, **kwargs)
        except BaseException:
            self._start_afresh()
            raise
        finally:
            self.active = None
            part.runner.end()
        self._close(part, active, self._flops[shapes])
        return output

    def _counted(self, part: Part, active: CallState) -> StepFlops:
        """What this call costs on all ranks that share the image, told once for calls of these shapes."""
        outside = active.counted() - active.signal_flops - active.recorder_flops - sum(active.block_flops)
        modules, count = part.runner.modules.flops, len(active.block_flops)
        *parts, signal = self.exchange.share([*active.block_flops, *modules, active.signal_flops])
        blocks = tuple(parts[:count])
        return StepFlops(blocks, sum(blocks) + outside * self.partition.branches, signal, tuple(parts[count:]))

    def _start_afresh(self) -> None:
        self._flush()
        self._branches.clear()
        self.tracker.generation_starts()

    def _start_generation(self, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._flush()
        self._branches.clear()
        if self.calibrator.before_generation(self._num_steps):
            self.planner.use(self.calibrator.calibration)
        self.statistics.start_generation()
        added = any(part.read(name, args, kwargs) is not None for name in self.spec.between_blocks)
        corrector = self.planner.corrector
        by_block = corrector.exchanges_per_block or self.policy.observes_blocks or corrector.measures
        by_block = by_block or self.config.predictor == "linear"
        one_by_one = added or not self.spec.contiguous or (by_block and not corrector.whole_steps)
        self.planner.spans = cut(len(self.blocks), self.policy.probe_blocks, one_by_one)

    def _open(self, part: Part, call: Call) -> CallState:
        key = (self.parts.index(part), call.branch)
        if key not in self._branches:
            self._branches[key] = self._new_branch(part, call)
        record = StepRecord.empty(call.step, len(self.blocks))
        self.active = CallState(call, self._branches[key], record, block_flops=[0.0] * len(self.blocks))
        return self.active

    def _new_branch(self, part: Part, call: Call) -> Branch:
        """Empty memory; what has been spent and learned under another denoiser goes on, its activations go."""
        branch = self.planner.new_branch()
        others = [key for key in self._branches if key[1] == call.branch]
        if others:
            self._flush()
        for key in others:
            branch.corrector_state = self._branches.pop(key).corrector_state
        return branch

    def _close(self, part: Part, active: CallState, flops: StepFlops) -> None:
        part.runner.close(active, flops)
        self.statistics.add(active.call.branch, active.record, flops)
        self.planner.close(active)

    def _flush(self) -> None:
        """Take in what the last step measured, where no later step will: one process only, since ranks must agree."""
        if self.exchange.group is not None:
            return
        for branch in self._branches.values():
            self.planner.tell(branch)
