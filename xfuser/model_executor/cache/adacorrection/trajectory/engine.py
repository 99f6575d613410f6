"""What the user holds: attached to a pipeline, it learns once and then evaluates the denoiser where that pays."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from xfuser.config.cache import FIRST
from xfuser.config.trajectory import AUTO, TrajectoryConfig
from xfuser.core.distributed.agreement import Agreement
from xfuser.core.distributed.environment import synchronize
from xfuser.core.distributed.shutdown import one_line
from xfuser.model_executor.cache.adacorrection.trajectory.branches import HalfBatch
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration, Learned, Store
from xfuser.model_executor.cache.adacorrection.trajectory.fingerprint import (
    describe_denoiser,
    describe_scheduler,
    difference,
    fingerprint,
)
from xfuser.model_executor.cache.adacorrection.trajectory.following import Attachment, check_pipeline, denoiser_names
from xfuser.model_executor.cache.adacorrection.trajectory.generation import Generation, prev_sample_of
from xfuser.model_executor.cache.adacorrection.trajectory.goals import Goal
from xfuser.model_executor.cache.adacorrection.trajectory.learning import Learner, NotLearnable
from xfuser.model_executor.cache.adacorrection.trajectory.replaying import Finer, PipelineCall, RandomState
from xfuser.model_executor.cache.adacorrection.trajectory.spending import Counter, Spending
from xfuser.model_executor.cache.adacorrection.trajectory.summary import describe

logger = logging.getLogger(__name__)

STEP_ARGUMENTS = ("model_output", "timestep", "sample")


class TrajectoryEngine:
    """Evaluates the denoiser at some steps only, and corrects the latent at every step. Made by `attach_trajectory`.

    Args:
        pipeline: A diffusers pipeline with a denoiser and a scheduler.
        config: The settings.
        agreement: Of the ranks that share an image; by default there is one process.
        stores: Whether this process writes calibrations.
        apart: Whether one branch of guidance may be evaluated without the other.
        above_blocks: Whether an engine at the block level may follow the same scheduler.
        counter: Counts what a base method would spend; that is then the budget, whatever the settings name.
    """

    def __init__(
        self,
        pipeline: Any,
        config: TrajectoryConfig,
        agreement: Agreement | None = None,
        stores: bool = True,
        apart: bool = True,
        above_blocks: bool = False,
        counter: Counter | None = None,
    ) -> None:
        self.pipeline, self.config = pipeline, config
        self._spending = None if counter is None else Spending(counter)
        self._above_blocks = above_blocks
        self.store = Store(config.store)
        self.goal = Goal(config, apart)
        self.generation: Generation | None = None
        self.calibration: Calibration | None = None
        self.chosen: Learned | None = None
        self.half_batch = HalfBatch()
        self.observer: Finer | None = None
        self.agreement = agreement or Agreement()
        self.stores = stores and config.calibration != FIRST
        learns = config.calibration in (AUTO, FIRST)
        self._given = None if learns else Calibration.load(Path(config.calibration))
        self._known: dict[str, Calibration] = {}
        self._learner = Learner(self)
        self._inside = False
        self._summary: dict[str, Any] = {}
        self._said: set[str] = set()
        self._key = ""
        self._refused: dict[str, ValueError] = {}
        self._unlearnable: dict[str, str] = {}
        self.loops = 0  # of the scheduler, that the call has begun
        self._weights: dict[str, dict[str, Any]] = {}
        self.generations = self.learned_generations = 0
        self.attachment = self._attach(above_blocks)

    # -- the public calls ---------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Tell in plain types what was asked, predicted and got, and how the last generation went."""
        return {
            "method": "trajectory",
            "adacorrection": "trajectory",
            "asked": self.goal.asked(),
            "generations": self.generations,
            "learned_generations": self.learned_generations,
            "calibrated": self.calibration is not None,
            **self._summary,
        }

    def reset(self) -> None:
        """Forget the generation that runs and all that was counted; what was learned stays."""
        self.generation = None
        self._summary = {}
        self.generations = self.learned_generations = 0

    def remove(self) -> None:
        """Take the engine off again: every attribute and class is what it was before."""
        self.attachment.undo()
        if self.generation is not None:
            self.generation.forget()

    def learn_from(
        self,
        calls: Sequence[dict[str, Any]],
        evaluations: Sequence[float] = (),
        progress: Callable[[], None] = lambda: None,
    ) -> Calibration:
        """Learn from several calls of the pipeline in turn, and choose between placements on them.

        Args:
            calls: Keyword arguments of the pipeline's call, one dict a batch.
            evaluations: Budgets (shares of all evaluations) to learn besides the one that the goal asks for.
            progress: Called after each generation.

        Raises:
            ValueError: Nothing can be learned from them; the line says why.
        """
        return self._learner.learn_from(calls, evaluations, progress)

    def _attach(self, above_blocks: bool) -> Attachment:
        hooks = (self._run_pipeline, self._run_denoiser, self._wrap_set_timesteps, self._wrap_step)
        return Attachment(self.pipeline, *hooks, above_blocks)

    # -- what is followed ---------------------------------------------------------------------------------------------

    def denoisers(self) -> list[str]:
        """Name the pipeline's denoisers."""
        return denoiser_names(self.pipeline)

    # -- what the pipeline calls --------------------------------------------------------------------------------------

    def _run_pipeline(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside:
            return original(*args, **kwargs)
        if self.attachment.follow():
            self.half_batch = HalfBatch()
        self._weights = {name: describe_denoiser(getattr(self.pipeline, name)) for name in self.denoisers()}
        random = RandomState.of(self.pipeline, args, kwargs)
        self._inside = True
        self.generation, self.loops = None, 0
        try:
            if self._spending is not None and self._spending.wanted:
                result = self._run_counted(self._spending, original, args, kwargs)
            else:
                result = original(*args, **kwargs)
            generation = self.generation
            if generation is not None:
                if generation.recording is not None:
                    self._finish_recording(generation, PipelineCall(original, args, kwargs, random, result))
                self._count(generation)
            return result
        finally:
            self._inside = False
            if self.generation is not None:
                self.generation.forget()
                self.generation = None

    def _run_counted(
        self, spending: Spending, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the pipeline with the base method below the trajectory, counted and not obeyed."""
        self.attachment.undo()
        spending.begin()
        self.attachment = self._attach(above_blocks=True)
        self.half_batch.around = spending.counter.paused
        whole = False
        try:
            result = original(*args, **kwargs)
            whole = True
            return result
        finally:
            self.attachment.undo()
            self.half_batch.around = nullcontext
            spending.end(self._key, whole)
            self.goal.budget = spending.budget(self._key, self.calibration)
            self.attachment = self._attach(self._above_blocks)

    def _run_denoiser(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generation = self.generation
        return original(*args, **kwargs) if generation is None else generation.call(original, args, kwargs)

    def _wrap_set_timesteps(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if (self._inside or self._learner.replays) and self.observer is None:
                device = torch.device(getattr(self.pipeline, "_execution_device", None) or "cpu")
                self.loops += 1  # some pipelines have several in one call
                self.generation = Generation(lambda: synchronize(device), self.half_batch)
                self._learner.prepare(self.generation)
            return result

        return set_timesteps

    def _wrap_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)
        # Some schedulers take more before the sample (CogVideoXDPM), so arguments are told by name.
        named = tuple(name if name in signature.parameters else None for name in STEP_ARGUMENTS)
        names = named if None not in named else tuple(signature.parameters)[:3]

        def step(*args: Any, **kwargs: Any) -> Any:
            generation, observer = self.generation, self.observer
            if generation is None and observer is None:
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            output, timestep, sample = (bound.arguments[name] for name in names)
            if observer is not None:
                result = original(*args, **kwargs)
                observer.see(float(timestep), sample, prev_sample_of(result))
                return result
            return generation.end_step(lambda: original(*args, **kwargs), output, timestep, sample, self._decide)

        return step

    # -- deciding -----------------------------------------------------------------------------------------------------

    def key_of(self, generation: Generation) -> tuple[str, dict[str, Any]]:
        """Make the fingerprint of a generation whose first step has been evaluated."""
        assert generation.layout is not None
        scheduler = describe_scheduler(self.pipeline.scheduler, round(generation.first_timestep, 3))
        return fingerprint(self._weights, scheduler, generation.layout, self.config.calibration_reference)

    def refuse(self, error: ValueError) -> None:
        """Say that the goal cannot be reached, and refuse the calls of this kind that follow."""
        self._refused[self._key] = error
        self._say(str(error))

    def _decide(self, generation: Generation) -> None:
        """At the end of a first step: apply what is known, or record."""
        if self._learner.takes(generation):
            return
        key, document = self.key_of(generation)
        if key in self._refused:
            raise self._refused[key]
        self._key = key
        if key in self._unlearnable:
            generation.give_up(self._unlearnable[key])
            return
        found = self.agreement.shared(lambda: self._find(key, document), _digest_of)
        self.calibration = found
        if self._spending is not None:
            self.goal.budget = self._spending.budget(key, found)
            if self.goal.budget is None:  # evaluated in full, and counted where that has begun with the call
                if self._spending.counting and self._given is None:
                    generation.record(raw=not self.config.replay)
                return
        wanted = self.config.calibration_images
        if found is not None and self._given is None:
            unlearned = self.goal.choose(found) is None
            found = None if unlearned or found.images < wanted else found
        if found is None:
            generation.record(raw=not self.config.replay)
            return
        self._known[key] = found
        self._apply(generation, found)

    def _apply(self, generation: Generation, found: Calibration) -> None:
        learned = self.chosen = self.goal.choose(found, self._given is not None)
        if learned is None or learned.plan.is_full:
            return
        layout = generation.layout
        assert layout is not None
        if len(layout.places) == 2:
            generation.layout = layout if layout.places == found.places else layout.swapped()
        if found.half_names is not None:
            self.half_batch.names = frozenset(found.half_names)
        generation.plan, generation.weights = learned.plan, learned.weights

    def _find(self, key: str, document: dict[str, Any]) -> Calibration | None:
        if self._given is not None:
            if self._given.key != key:
                raise ValueError(
                    f"calibration: it was made with {difference(document, self._given.fingerprint)}; run "
                    "`xdit calibrate` again, or use calibration='auto'"
                )
            return self._given
        return self.known(key)

    def known(self, key: str) -> Calibration | None:
        """Find what was learned with a fingerprint, here or, where the settings allow it, by an earlier process."""
        if key in self._known or self.config.calibration == FIRST:
            return self._known.get(key)
        return self.store.find(key)

    def keep(self, calibration: Calibration) -> None:
        """Take a calibration for the one in force, and store it."""
        self._known[calibration.key] = self.calibration = calibration
        if self._spending is not None:
            self._spending.note(calibration)
        if self.stores:
            try:
                self.store.keep(calibration)
            except OSError as error:  # the image is there, on every rank; only this one has something to write
                self._say(f"what was learned cannot be stored, and is learned again by the next process: {error}")

    def _finish_recording(self, generation: Generation, call: PipelineCall) -> None:
        if self._learner.collect(generation, call):
            return
        problem = self._learner.unusable(generation)
        if problem is None and self._spending is not None and self.goal.budget is None:
            problem = "what the base method spends was not counted"
        if problem is not None:
            self._say(f"nothing is learned from this generation: {problem}; it was evaluated in full")
            return
        try:
            learned = self._learner.learn(generation, call)
        except NotLearnable as error:
            self.refuse(error)  # the image is exact, and not lost for that
            return
        except Exception as error:
            if self.agreement.group is not None:
                raise  # the others wait in what this rank has left
            # Whatever a pipeline makes of skipped steps: its image is there, and exact.
            self._unlearnable[self._key] = f"when it was called again to learn from: {one_line(error)}"
            self._say(f"nothing is learned of this kind of call; it is evaluated in full ({one_line(error)})")
            logger.debug("trajectory: the replay failed", exc_info=True)
            return
        self.keep(learned)
        self.learned_generations += 1

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("trajectory: %s", text)

    # -- counting -----------------------------------------------------------------------------------------------------

    def _count(self, generation: Generation) -> None:
        self.generations += 1
        learned = self.chosen if generation.plan is not None else None
        counter = None if self._spending is None else self._spending.counter.name
        self._summary = {**describe(generation, self.calibration, learned, self.goal), "base": counter}
        self._summary["reference"] = self.config.calibration_reference
        if generation.broken is not None and generation.recording is None and self._key not in self._unlearnable:
            self._say(f"nothing more was skipped in this generation: {generation.broken}")


def attach_trajectory(
    pipeline: Any,
    agreement: Agreement | None = None,
    stores: bool = True,
    apart: bool = True,
    above_blocks: bool = False,
    counter: Counter | None = None,
    **settings: Any,
) -> TrajectoryEngine:
    """Attach AdaCorrection on the trajectory to any diffusers pipeline with a denoiser and a scheduler.

    Args:
        pipeline: The pipeline.
        agreement: Of the ranks that share an image; by default there is one process.
        stores: Whether this process writes calibrations.
        apart: Whether one branch of guidance may be evaluated without the other.
        above_blocks: Whether an engine at the block level may be attached to the pipeline already.
        counter: Counts what a base method would spend, which is then the goal instead of one in the settings.
        **settings: The fields of `TrajectoryConfig`.

    Raises:
        TypeError: Unknown setting, or a pipeline that cannot be followed. Nothing has been changed then.
        ValueError: A value out of its range, a calibration that cannot be read, or a cache is attached already.
    """
    known = list(TrajectoryConfig.__dataclass_fields__)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)} for the trajectory; known are {', '.join(known)}")
    config = TrajectoryConfig(**settings, **({} if counter is None else {"adacorr_budget": 1.0}))
    check_pipeline(pipeline, above_blocks)
    return TrajectoryEngine(pipeline, config, agreement, stores, apart, above_blocks, counter)


def _digest_of(calibration: Calibration | None) -> str | None:
    return None if calibration is None else calibration.digest()
