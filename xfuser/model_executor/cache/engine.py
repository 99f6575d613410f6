"""The cache engine: attached to a transformer's blocks, it decides at every step which of them run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.attention import AttentionContext
from xfuser.core.distributed.statistics import SumExchange
from xfuser.model_executor.adapters import BoundArguments, ModelDeclaration, declaration_of
from xfuser.model_executor.cache.adacorrection.trajectory.fingerprint import weights_digest
from xfuser.model_executor.cache.attach import (
    Replacement,
    check_scheduler_free,
    check_transformer_free,
    drop_empty_registry,
    has_registry,
    named_contexts,
    scheduler_calls,
)
from xfuser.model_executor.cache.calibrating import Calibrator
from xfuser.model_executor.cache.calibration import Calibration, describe_model
from xfuser.model_executor.cache.compiling import CompilableBlock, check_compiled
from xfuser.model_executor.cache.deliberation import StepPlanner
from xfuser.model_executor.cache.execution import BlockRunner
from xfuser.model_executor.cache.flops import FlopCount, StepFlops, signature
from xfuser.model_executor.cache.following import PipelineFollower
from xfuser.model_executor.cache.foreign import (
    check_no_other_cache,
    check_not_compiled_whole,
    refusing_calls,
    uncompilable,
)
from xfuser.model_executor.cache.plan import cut
from xfuser.model_executor.cache.policies import build_policy
from xfuser.model_executor.cache.staged import StageRunner
from xfuser.model_executor.cache.state import BlockCall, Branch, CallState
from xfuser.model_executor.cache.statistics import Statistics, StepRecord
from xfuser.model_executor.cache.steps import BranchKey, Call, StepTracker
from xfuser.model_executor.pipefusion import Placement, Stage


def with_threshold(config: CacheConfig, declaration: ModelDeclaration, transformer: nn.Module) -> CacheConfig:
    """Take the base method's default threshold for this transformer where the settings name none."""
    if config.rel_l1_thresh is not None:
        return config
    return replace(config, rel_l1_thresh=declaration.threshold(config.use_cache, transformer))


class CacheEngine:
    """Attaches a base method, and AdaCorrection if asked for, to a transformer.

    Made by `apply_cache_on_transformer` and `apply_cache_on_pipeline`. The engine replaces ``forward`` on the
    transformer and on its block instances; weights, hooks and classes stay as they are.

    Args:
        transformer: A diffusers transformer.
        declaration: How it is cut into blocks.
        config: The settings.
        exchange: Adds up what the ranks that share an image measure; by default there is one process.
        calibration: What is known of the model.
        placement: This process's images, tokens and blocks; by default all.
        attention: Sees the tokens of other ranks; by default there are none.
    """

    def __init__(
        self,
        transformer: nn.Module,
        declaration: ModelDeclaration,
        config: CacheConfig,
        exchange: SumExchange | None = None,
        calibration: Calibration | None = None,
        placement: Placement | None = None,
        attention: AttentionContext | None = None,
    ) -> None:
        self.exchange = exchange or SumExchange()
        self.paused = False  # calls go through unseen
        self._asked, self._given_placement, self._attention = config, placement, attention
        self._scheduler: Any = None
        self._follower: PipelineFollower | None = None
        self._build(transformer, declaration, calibration)
        check_compiled(self.blocks, self._wraps_attention)
        self._attach()

    def _build(self, transformer: nn.Module, declaration: ModelDeclaration, calibration: Calibration | None) -> None:
        """Make everything that belongs to one transformer."""
        config = with_threshold(self._asked, declaration, transformer)
        self.transformer, self.declaration, self.config = transformer, declaration, config
        self.blocks = declaration.blocks(transformer)
        self.policy = build_policy(config, declaration, len(self.blocks))
        self.statistics = Statistics(len(self.blocks))
        self.placement = self._given_placement or Placement(Stage.alone(len(self.blocks)))
        self.planner = StepPlanner(config, self.policy, self.exchange, self.statistics, calibration, self.placement)
        self.calibrator = Calibrator(config, len(self.blocks), calibration, self._describe, self._weights)
        kind = BlockRunner if self.placement.stage.is_alone else StageRunner
        self.runner = kind(
            config,
            declaration,
            self.blocks,
            self.policy,
            self.planner,
            self.calibrator,
            self.placement,
            self._attention,
        )
        self.runner.reset()
        self.tracker = StepTracker(config.num_steps, declaration.timestep_direction)
        self._branches: dict[BranchKey, Branch] = {}
        self._active: CallState | None = None
        self._context: str | None = None
        self._num_steps: int | None = config.num_steps
        self._flops: dict[tuple[Any, ...], StepFlops] = {}
        self._replacements: list[Replacement | CompilableBlock] = []
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
            "approximation": None if config.use_cache is None else config.stand_in,  # nothing has to be stood in for
            "collectives": self.exchange.collectives,
            "calibrated": self.planner.calibration is not None,
            "memory_bytes": sum(branch.bytes() for branch in self._branches.values()),
            "rules_off": self._rules_off(),
            **self.runner.summary(),
            **self.statistics.summary(),
        }

    def _rules_off(self) -> list[str]:
        if self._num_steps is not None:
            return []
        return [*self.policy.needs_num_steps, *self.planner.corrector.needs_num_steps]

    def record(self) -> None:
        """From the next generation on, evaluate everything and keep what a calibration is made from.

        Raises:
            ValueError: Several ranks share the image, and each sees a part of its tokens, branches or blocks only.
        """
        if self.exchange.group is not None:
            raise ValueError(
                "record() sees this rank's part of an image only; calibrate in one process (`xdit calibrate`) and give "
                "every rank the file, as calibration='mine.safetensors'"
            )
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

    def _weights(self) -> tuple[str, Any]:
        """What changes with a LoRA, with other weights in place of these, and with their type."""
        return weights_digest(self.transformer), next(self.transformer.parameters()).dtype

    def reset(self) -> None:
        """Forget every remembered activation and every statistic. The next call starts a generation."""
        self.calibrator.settle()
        self._branches.clear()
        self._active = None
        self.tracker.reset()
        self.statistics.reset()
        self.runner.reset()

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

    def move_to(self, transformer: nn.Module) -> None:
        """Leave the transformer for another one; statistics begin anew.

        Raises:
            TypeError: It is not supported.
            ValueError: It has an engine already, or the calibration was made with another; nothing has changed then.
        """
        if self._given_placement is not None:
            raise ValueError(
                "the transformer was replaced after it was spread over its ranks; remove(), and parallelize() again"
            )
        declaration = declaration_of(transformer)
        check_not_compiled_whole(transformer)
        check_transformer_free(transformer)
        check_no_other_cache(transformer)
        declaration.check_return_order(self.config.return_hidden_states_first)
        check_compiled(declaration.blocks(transformer), self._wraps_attention)
        before, scheduler = self.calibrator, self._scheduler
        before.check(transformer, declaration.blocks(transformer), scheduler)
        calibration = before.forget()
        self._detach()
        self._build(transformer, declaration, calibration)
        if before.records_all:
            self.record()
        self._attach()
        if scheduler is not None:
            self.watch_scheduler(scheduler)

    def _attach(self) -> None:
        self._had_registry = has_registry(self.transformer)
        self._root_arguments = BoundArguments(self.transformer.forward)
        self._replacements.append(Replacement(self.transformer, "forward", self._wrap_root))
        self._replacements += refusing_calls(self.transformer)
        if hasattr(self.transformer, "cache_context"):
            wrap = named_contexts(self._note_context)
            self._replacements.append(Replacement(self.transformer, "cache_context", wrap))
        for index, block in enumerate(self.blocks):
            self._replacements.append(CompilableBlock(block, self._block_wrapper(index), self._wraps_attention))
        self._replacements += self.runner.attach()

    @property
    def _wraps_attention(self) -> bool:
        return self.runner.tokens is not None

    def _detach(self) -> None:
        self._flush()
        self._leave_scheduler()
        while self._replacements:
            self._replacements.pop().undo()
        self._branches.clear()
        self.tracker.reset()
        if not self._had_registry:
            drop_empty_registry(self.transformer)

    def _leave_scheduler(self) -> None:
        while self._scheduler_marks:
            self._scheduler_marks.pop().undo()
        self._scheduler = None

    def _note_context(self, name: str | None) -> None:
        self._context = name

    def _wrap_root(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run_transformer(original, args, kwargs)

        root = uncompilable(forward)
        root.cache_engine = self  # type: ignore[attr-defined]
        return root

    def _block_wrapper(self, index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._active is None:
                    return original(*args, **kwargs)
                streams = self.runner.streams_of(index, args, kwargs)
                return self.runner.run_block(self._active, BlockCall(index, original, args, kwargs, streams))

            return forward

        return wrap

    # -- one call of the transformer ----------------------------------------------------------------------------------

    def _run_transformer(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._follower is not None:
            self._follower.follow_scheduler()
        if self.paused or any(self._root_arguments.read(name, args, kwargs) for name in self.declaration.skips_blocks):
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
                with FlopCount() as active.counter:
                    output = original(*args, **kwargs)
                self._flops[shapes] = self._counted(active)
            else:
                output = original(*args, **kwargs)
        except BaseException:
            self._start_afresh()
            raise
        finally:
            self._active = None
        self._close(active, self._flops[shapes])
        return output

    def _counted(self, active: CallState) -> StepFlops:
        """What this call costs on all ranks that share the image, told once for calls of these shapes."""
        outside = active.counted() - active.signal_flops - active.recorder_flops - sum(active.block_flops)
        *blocks, signal = self.exchange.share([*active.block_flops, active.signal_flops])
        return StepFlops(tuple(blocks), sum(blocks) + outside * self.placement.branches, signal)

    def _start_afresh(self) -> None:
        self._flush()
        self._branches.clear()
        self.tracker.generation_starts()

    def _start_generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._flush()
        self._branches.clear()
        if self.calibrator.before_generation(self._num_steps):
            self.planner.use(self.calibrator.calibration)
        self.statistics.start_generation()
        added = any(
            self._root_arguments.read(name, args, kwargs) is not None for name in self.declaration.between_blocks
        )
        corrector = self.planner.corrector
        by_block = corrector.exchanges_per_block or self.policy.observes_blocks or corrector.measures
        by_block = by_block or self.config.stand_in == "linear"
        one_by_one = added or (by_block and not corrector.whole_steps)
        self.planner.spans = cut(len(self.blocks), self.policy.probe_blocks, one_by_one)

    def _open(self, call: Call) -> CallState:
        if call.branch not in self._branches:
            self._branches[call.branch] = self.planner.new_branch()
        record = StepRecord.empty(call.step, len(self.blocks))
        self._active = CallState(call, self._branches[call.branch], record, block_flops=[0.0] * len(self.blocks))
        return self._active

    def _close(self, active: CallState, flops: StepFlops) -> None:
        self.statistics.add(active.call.branch, active.record, flops)
        self.planner.close(active)

    def _flush(self) -> None:
        """Take in what the last step measured, where no later step will: one process only, since ranks must agree."""
        if self.exchange.group is not None:
            return
        for branch in self._branches.values():
            self.planner.tell(branch)
