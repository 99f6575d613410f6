"""Learn from full generations: record them, place the evaluations, replay under the plan to fit the weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration, Learned
from xfuser.model_executor.cache.adacorrection.trajectory.generation import Fit, Generation
from xfuser.model_executor.cache.adacorrection.trajectory.goals import Unreachable, speedup_of
from xfuser.model_executor.cache.adacorrection.trajectory.plan import FULL, Plan
from xfuser.model_executor.cache.adacorrection.trajectory.recording import Recording, add_grams, pixels_of
from xfuser.model_executor.cache.adacorrection.trajectory.replaying import (
    Finer,
    RandomState,
    by_name,
    contains,
    grid_of,
)
from xfuser.model_executor.cache.adacorrection.trajectory.schedule import Gram, Scheduler, even_placement
from xfuser.model_executor.cache.adacorrection.trajectory.settings import refinement

if TYPE_CHECKING:
    from xfuser.model_executor.cache.adacorrection.trajectory.engine import TrajectoryEngine

CALLBACKS = ("callback", "callback_on_step_end")
EARLY = 0.02  # by which a plan's predicted speed-up may stay below what was asked for
EXACT = 100.0  # dB, where nothing differs


@dataclass
class Sample:
    """One recorded call, which can be made again.

    Attributes:
        again: Makes the call with the same random numbers and without the user's callbacks.
        recording: Its own run.
        reference: The latents that replays are to meet, x_0 … x_T.
        pixels: The reference's decoded images and their range, where they can be read.
    """

    again: Callable[..., Any]
    recording: Recording
    reference: list[torch.Tensor]
    pixels: tuple[np.ndarray, float] | None
    key: str = ""
    document: dict[str, Any] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)


class Learner:
    """What an engine learns with. One replay or recording at a time goes through the engine's own hooks."""

    def __init__(self, engine: TrajectoryEngine) -> None:
        self._engine = engine
        self._records = False
        self._replay: tuple[Plan, Fit | None, Recording, list[torch.Tensor] | None] | None = None

    # -- what the engine asks -----------------------------------------------------------------------------------------

    def prepare(self, generation: Generation) -> None:
        """Set a generation up that is a replay."""
        if self._replay is None:
            return
        plan, fit, _, weights = self._replay
        generation.plan, generation.fit, generation.weights = plan, fit, weights

    def takes(self, generation: Generation) -> bool:
        """Whether a generation is a replay or a recording of the learner's own; called at the end of its first step."""
        if self._replay is not None:
            generation.layout = self._replay[2].layout
            return True
        if self._records:
            assert generation.layout is not None
            generation.recording = Recording(generation.layout)
        return self._records

    def unusable(self, generation: Generation) -> str | None:
        """Say why nothing can be learned from a recorded generation; ``None`` where all is well."""
        recording = generation.recording
        if generation.broken is not None:
            return generation.broken
        grid = getattr(self._engine.pipeline.scheduler, "timesteps", None)
        assert recording is not None
        done = len(recording.latents)
        if isinstance(grid, torch.Tensor):
            given = [round(float(each), 3) for each in grid.flatten().tolist()]
            first = round(generation.timesteps[0], 3)
            if first not in given or done != len(given) - given.index(first):
                return f"it stopped after {done} of {len(given)} steps"
        if done < 2:
            return "it has one step only"
        if not all(bool(torch.isfinite(latents).all()) for latents in recording.latents):
            return "its latents are not finite"
        return None

    def learn(
        self,
        generation: Generation,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        random: RandomState,
        result: Any,
    ) -> Calibration:
        """Learn at the first use: from the generation that has just run, with one replay."""
        sample = self._sample(generation, original, args, kwargs, random, result)
        after = random.now()
        known = self._engine._known.get(sample.key) or self._engine.store.find(sample.key)
        calibration = self._engine.agree(self._known(known, [sample]))
        try:
            for plan in self._plans(calibration, [sample]):
                self.fit(calibration, plan, [sample])
        finally:
            after.restore()
        return self._engine.agree(calibration)

    def learn_from(
        self, calls: Sequence[dict[str, Any]], evaluations: Sequence[float], progress: Callable[[], None]
    ) -> Calibration:
        """See `TrajectoryEngine.learn_from`."""
        engine = self._engine
        if not calls:
            raise ValueError("there is nothing to learn from; give at least one call's arguments")
        samples = []
        self._records = True
        try:
            for call in calls:
                samples.append(self.record(call))
                progress()
        finally:
            self._records = False
        if len({sample.key for sample in samples}) > 1:
            raise ValueError("the calls differ in their steps, guidance or scheduler; learn from calls of one kind")
        calibration = engine.agree(self._known(None, samples))
        budgets = [round(share * FULL * calibration.steps) for share in evaluations]
        self._learn_budgets(calibration, samples, budgets, progress)
        calibration = engine.agree(calibration)
        engine._known[calibration.key] = engine.calibration = calibration
        if engine.stores:
            engine.store.keep(calibration)
        return calibration

    # -- recording ----------------------------------------------------------------------------------------------------

    def record(self, call: dict[str, Any]) -> Sample:
        """Run one call in full.

        Raises:
            ValueError: Nothing can be learned from it.
        """
        engine = self._engine
        seen: list[Sample] = []

        def finish(generation: Generation, original: Any, args: Any, kwargs: Any, random: Any, result: Any) -> None:
            problem = self.unusable(generation)
            if problem is not None:
                raise ValueError(f"nothing can be learned from this call: {problem}")
            seen.append(self._sample(generation, original, args, kwargs, random, result))

        engine._finish_recording, kept = finish, engine._finish_recording  # type: ignore[method-assign]
        try:
            engine.pipeline(**call)
        finally:
            engine._finish_recording = kept  # type: ignore[method-assign]
        if not seen:
            raise ValueError("the pipeline took no scheduler step, so there is nothing to learn from")
        return seen[0]

    def _sample(
        self,
        generation: Generation,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        random: RandomState,
        result: Any,
    ) -> Sample:
        recording = generation.recording
        assert recording is not None and recording.layout is not None
        last = recording.layout.fold(generation.last_latents)
        recording.latents.append(last.detach().to("cpu", torch.float32, copy=True))
        recording.order_branches()
        positional, named = by_name(type(self._engine.pipeline).__call__, args, kwargs)
        quiet = {name: value for name, value in named.items() if name not in CALLBACKS}

        def again(**changes: Any) -> Any:
            random.restore()
            return original(*positional, **(quiet | changes))

        key, document = self._engine.key_of(generation)
        sample = Sample(
            again, recording, recording.latents, pixels_of(result), key, document, list(generation.timesteps)
        )
        self._refine(sample, kwargs)
        return sample

    def _refine(self, sample: Sample, kwargs: dict[str, Any]) -> None:
        """Take the latents of a run on a finer grid for the reference, where the settings ask for one."""
        factor = refinement(self._engine.config.calibration_reference)
        if factor == 1:
            return
        steps = sample.recording.steps
        scheduler = self._engine.pipeline.scheduler
        coarse = grid_of(scheduler)
        asked = kwargs.get("num_inference_steps")
        if (
            asked is None
            or getattr(scheduler, "is_stochastic", False)
            or "ancestral" in type(scheduler).__name__.lower()
        ):
            raise ValueError(
                "calibration_reference needs num_inference_steps in the call and a deterministic scheduler"
            )
        device = getattr(self._engine.pipeline, "_execution_device", None)
        for count in (factor * (steps - 1) + 1, factor * steps):
            type(scheduler).set_timesteps(scheduler, count, device=device)
            if not contains(grid_of(scheduler), coarse, factor):
                continue
            finer = Finer(factor, steps)
            self._engine.generation = None
            self._engine._observer = finer
            try:
                result = sample.again(num_inference_steps=count)
            finally:
                self._engine._observer = None
            sample.reference = [sample.recording.layout.fold(each) for each in finer.latents()]
            sample.pixels = pixels_of(result)
            return
        raise ValueError(
            f"calibration_reference={factor}x: {type(scheduler).__name__} has no grid of {factor} times the steps that "
            "contains this one; leave it out"
        )

    # -- plans --------------------------------------------------------------------------------------------------------

    def _known(self, known: Calibration | None, samples: list[Sample]) -> Calibration:
        """Join what was known with what new recordings say."""
        first = samples[0]
        gram: Gram | None = None if known is None else known.gram
        for sample in samples:
            gram = add_grams(gram, sample.recording.gram())
        assert gram is not None
        halves = self._engine._half_batches.get(0)
        names = None if halves is None or halves.names is None else sorted(halves.names, key=str)
        recording = first.recording
        apart = len(recording.layout.places) == 2 and (not recording.layout.halves or names is not None)
        calibration = Calibration(
            first.document,
            first.key,
            gram,
            (0 if known is None else known.images) + sum(sample.recording.images for sample in samples),
            recording.layout.places,
            _timing([sample.recording for sample in samples], halves.seconds if names else None),
            {} if known is None else known.learned,
            ({} if known is None else known.notes)
            | {"batch": recording.images, "shape": list(recording.latents[0].shape[1:])},
        )
        calibration.half_names = names
        calibration.apart = apart and self._engine.may_part
        return calibration

    def _plans(self, calibration: Calibration, samples: list[Sample]) -> list[Plan]:
        """Choose the plans to learn at the first use."""
        goal = self._engine.goal
        if goal.by_quality:
            self._search_quality(calibration, samples)
            return []
        try:
            apart = calibration.apart and self._engine.config.branches_apart
            units = goal.units(calibration.steps, calibration.timing, apart)
        except Unreachable as error:
            self._engine.refuse(error)
            return []
        present = goal.choose(calibration)
        if present is not None:
            return [present.plan]
        if units >= FULL * calibration.steps:
            return [Plan.full(calibration.steps)]
        scheduler = Scheduler.of(calibration.gram, units, apart)
        plan = scheduler.plan(units)
        asked = self._engine.config.target_speedup
        while asked is not None and units > FULL and speedup_of(plan, calibration.timing) < (1 - EARLY) * asked:
            units -= 1
            plan = scheduler.plan(units)
        if asked is not None:
            calibration.notes.setdefault("speedups", {})[f"{asked:g}"] = plan.digest
        return [plan]

    def placements(self, calibration: Calibration, units: int) -> list[Plan]:
        """List the candidates for a budget, the one that is taken unseen first."""
        apart = calibration.apart and self._engine.config.branches_apart
        if units >= FULL * calibration.steps:
            return [Plan.full(calibration.steps)]
        whole = max(1, units // FULL)
        plans = []
        if apart:
            plans.append(Scheduler.of(calibration.gram, units, True).plan(units))
        plans.append(Scheduler.of(calibration.gram, FULL * whole, False).plan(FULL * whole))
        plans.append(even_placement(calibration.steps, whole))
        return list({plan.digest: plan for plan in plans}.values())

    def _learn_budgets(
        self, calibration: Calibration, samples: list[Sample], budgets: list[int], progress: Callable[[], None]
    ) -> None:
        goal = self._engine.goal
        if goal.by_quality:
            self._search_quality(calibration, samples)
        else:
            apart = calibration.apart and self._engine.config.branches_apart
            budgets = [goal.units(calibration.steps, calibration.timing, apart), *budgets]
        for units in dict.fromkeys(budgets):
            fitted = []
            for plan in self.placements(calibration, units):
                fitted.append(self.fit(calibration, plan, samples))
                progress()
            # What does not beat another placement of the same cost is not kept.
            for each in sorted(fitted, key=lambda known: known.predicted_psnr or 0.0)[:-1]:
                del calibration.learned[each.plan.digest]

    def _search_quality(self, calibration: Calibration, samples: list[Sample]) -> None:
        """Find the fewest evaluations whose predicted PSNR is enough, by bisection."""
        wanted = float(self._engine.config.min_psnr or 0)
        step = 1 if calibration.apart and self._engine.config.branches_apart else FULL
        low, high = FULL, FULL * calibration.steps
        while high - low > step:
            middle = (low + high) // 2
            middle -= (middle - low) % step
            plan = self.placements(calibration, middle)[0]
            psnr = self.fit(calibration, plan, samples).predicted_psnr
            low, high = (low, middle) if psnr is not None and psnr >= wanted else (middle, high)
        if high == FULL * calibration.steps:
            self.fit(calibration, Plan.full(calibration.steps), samples)
        calibration.notes["searched_psnr"] = [*calibration.notes.get("searched_psnr", []), self._engine.config.min_psnr]

    # -- replays ------------------------------------------------------------------------------------------------------

    def fit(self, calibration: Calibration, plan: Plan, samples: list[Sample]) -> Learned:
        """Learn one plan's weights: every sample is replayed in turn, with what the ones before it have shown."""
        learned = calibration.learned.get(plan.digest) or Learned(plan)
        if plan.is_full:  # exact, and without weights
            samples, learned.psnr = [], [EXACT]
        for sample in samples:
            raw = None if self._engine.config.replay else sample.recording.raw
            fit = Fit.of(sample.reference, learned.equations, raw)
            result, last = self._run(sample, plan, fit, None)
            learned.equations, learned.weights, learned.shrinkage = fit.equations, fit.weights, fit.shrinkage
            psnr, learned.decoded = _psnr(sample, pixels_of(result), last)
            learned.psnr += psnr
        calibration.learned[plan.digest] = learned
        return learned

    def _run(
        self, sample: Sample, plan: Plan, fit: Fit | None, weights: list[torch.Tensor] | None
    ) -> tuple[Any, torch.Tensor]:
        engine = self._engine
        engine.generation = None
        self._replay = (plan, fit, sample.recording, weights)
        try:
            inside, engine._inside = engine._inside, True
            result = sample.again()
            generation = engine.generation
            if generation is None or generation.broken is not None or generation.step != sample.recording.steps:
                raise ValueError("the pipeline took other steps when it was called again with the same arguments")
            return result, sample.recording.layout.fold(generation.last_latents).detach().float().cpu()
        finally:
            engine._inside = inside
            self._replay = None
            if engine.generation is not None:
                engine.generation.forget()
            engine.generation = None


def _timing(recordings: list[Recording], half_seconds: float | None) -> dict[str, float]:
    denoiser = [each for recording in recordings for each in recording.denoiser_seconds[1:]]
    whole = [each for recording in recordings for each in recording.step_seconds[1:]]
    seconds = statistics.median(denoiser)
    return {
        "denoiser": seconds,
        "outside": max(statistics.median(whole) - seconds, 0.0),
        # A half batch saves less than half where the batch is small.
        "half_share": 0.5 if half_seconds is None else min(max(half_seconds / seconds, 0.5), 1.0),
    }


def _psnr(sample: Sample, pixels: tuple[np.ndarray, float] | None, last: torch.Tensor) -> tuple[list[float], bool]:
    """Compute each image's PSNR to the reference, on decoded images where they can be read, else on latents."""
    if pixels is not None and sample.pixels is not None and pixels[0].shape == sample.pixels[0].shape:
        ours, (theirs, peak) = pixels[0], sample.pixels
        decoded = True
    else:
        ours, theirs, decoded = last.numpy(), sample.reference[-1].numpy(), False
        peak = float(np.ptp(theirs)) or 1.0
    errors = np.square(ours - theirs).reshape(len(ours), -1).mean(axis=1)
    return [float(min(EXACT, 10 * np.log10(peak**2 / max(error, 1e-20)))) for error in errors], decoded
