"""Learn from full generations: record them, place the evaluations, replay under the plan to fit the weights."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xfuser.config.trajectory import refinement
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration, Learned
from xfuser.model_executor.cache.adacorrection.trajectory.generation import Fit, Generation
from xfuser.model_executor.cache.adacorrection.trajectory.goals import Unreachable, speedup_of
from xfuser.model_executor.cache.adacorrection.trajectory.plan import FULL, Plan
from xfuser.model_executor.cache.adacorrection.trajectory.recording import Recording, add_grams, pixels_of
from xfuser.model_executor.cache.adacorrection.trajectory.replaying import Finer, OtherGrid, PipelineCall, adds_noise
from xfuser.model_executor.cache.adacorrection.trajectory.schedule import Gram, Scheduler, even_placement

if TYPE_CHECKING:
    from xfuser.model_executor.cache.adacorrection.trajectory.engine import TrajectoryEngine

EARLY = 0.02  # by which a plan's predicted speed-up may stay below what was asked for
EMPHASES = (0.0, 0.5, 1.0, 2.0)  # on early jumps; which one is best differs from model to model and budget to budget
EXACT = 100.0  # dB, where nothing differs


class NotLearnable(ValueError):
    """A call cannot be learned from as the settings ask for; the line says why."""


@dataclass
class Sample:
    """One recorded call, which can be made again.

    Attributes:
        call: The call.
        recording: Its own run.
        reference: The latents that replays are to meet, x_0 … x_T.
        pixels: The reference's decoded images and their range, where they can be read.
        loop: Which of the call's loops was recorded, where a pipeline has several: its last.
        key: The fingerprint's digest.
        document: The fingerprint.
    """

    call: PipelineCall
    recording: Recording
    reference: list[torch.Tensor]
    pixels: tuple[np.ndarray, float] | None
    loop: int
    key: str
    document: dict[str, Any]


class Learner:
    """What an engine learns with. One replay or recording at a time goes through the engine's own hooks."""

    def __init__(self, engine: TrajectoryEngine) -> None:
        self._engine = engine
        self._collected: list[Sample] | None = None
        self._replay: tuple[Plan, Fit, Sample] | None = None

    # -- what the engine asks -----------------------------------------------------------------------------------------

    @property
    def replays(self) -> bool:
        """Whether the call that runs is a replay."""
        return self._replay is not None

    def prepare(self, generation: Generation) -> None:
        """Set a generation up that is a replay; a call's other loops are evaluated in full."""
        if self._replay is not None and self._engine.loops == self._replay[2].loop:
            generation.plan, generation.fit, _ = self._replay

    def takes(self, generation: Generation) -> bool:
        """Whether a generation is a replay or a recording of the learner's own; called at the end of its first step."""
        if self._replay is not None:
            if generation.fit is not None:
                generation.layout = self._replay[2].recording.layout
            return True
        if self._collected is not None:
            generation.record(raw=not self._engine.config.replay)
        return self._collected is not None

    def collect(self, generation: Generation, call: PipelineCall) -> bool:
        """Take a recorded call for `learn_from`; whether it was asked for.

        Raises:
            NotLearnable: Nothing can be learned from it.
        """
        if self._collected is None:
            return False
        problem = self.unusable(generation)
        if problem is not None:
            raise NotLearnable(f"nothing can be learned from this call: {problem}")
        self._collected.append(self._sample(generation, call))
        return True

    def unusable(self, generation: Generation) -> str | None:
        """Say why nothing can be learned from a recorded generation; ``None`` where all is well. Collective."""
        told = self._engine.agreement.gather(self._problem_of(generation))
        return next((problem for problem in told if problem is not None), None)

    def _problem_of(self, generation: Generation) -> str | None:
        recording = generation.recording
        if generation.broken is not None:
            return generation.broken
        grid = getattr(self._engine.pipeline.scheduler, "timesteps", None)
        assert recording is not None
        done = len(recording.latents)
        if isinstance(grid, torch.Tensor):
            given = [round(float(each), 3) for each in grid.flatten().tolist()]
            first = round(generation.first_timestep, 3)
            whole = len(given) - given.index(first) if first in given else 0
            if done > whole:
                return f"it took {done} steps on a grid of {len(given)}"
            if done < whole and not self._ends_early(whole - done):
                return f"it stopped after {done} of {len(given)} steps"
        if done < 2:
            return "it has one step only"
        if not all(bool(torch.isfinite(latents).all()) for latents in (*recording.latents, generation.last_latents)):
            return "its latents are not finite"
        return None

    def _ends_early(self, steps: int) -> bool:
        """Whether the pipeline itself leaves out the grid's last steps: some always one, some as many as asked for."""
        pipeline = self._engine.pipeline
        if getattr(pipeline, "interrupt", False):
            return False
        return steps == 1 or getattr(pipeline, "denoising_end", None) is not None

    def learn(self, generation: Generation, call: PipelineCall) -> Calibration:
        """Learn at the first use: from the generation that has just run, with one replay.

        Raises:
            NotLearnable: The call cannot be repeated, or has no finer grid where one was asked for.
        """
        engine = self._engine
        after = call.random.now()
        try:
            sample = self._sample(generation, call)
            calibration = engine.agreement.first(self._joined(engine.known(sample.key), [sample]))
            for plan in engine.agreement.first(self._plans(calibration, [sample])):
                self.fit(calibration, plan, [sample])
        finally:
            after.restore()
        return engine.agreement.first(calibration)

    def learn_from(
        self, calls: Sequence[dict[str, Any]], evaluations: Sequence[float], progress: Callable[[], None]
    ) -> Calibration:
        """See `TrajectoryEngine.learn_from`."""
        engine = self._engine
        samples: list[Sample] = []
        self._collected = samples
        try:
            for call in calls:
                engine.pipeline(**call)
                progress()
        finally:
            self._collected = None
        if not samples:
            raise NotLearnable("the pipeline took no scheduler step, so there is nothing to learn from")
        if len({sample.key for sample in samples}) > 1:
            raise NotLearnable("the calls differ in their steps, guidance or scheduler; learn from calls of one kind")
        calibration = engine.agreement.first(self._joined(None, samples))
        budgets = [max(FULL, round(share * FULL * calibration.steps)) for share in evaluations]
        self._learn_budgets(calibration, samples, budgets, progress)
        calibration = engine.agreement.first(calibration)
        engine.keep(calibration)
        return calibration

    # -- recording ----------------------------------------------------------------------------------------------------

    def _sample(self, generation: Generation, call: PipelineCall) -> Sample:
        recording = generation.recording
        assert recording is not None
        recording.finish(generation.last_latents)
        key, document = self._engine.key_of(generation)
        sample = Sample(call, recording, recording.latents, pixels_of(call.result), self._engine.loops, key, document)
        factor = refinement(self._engine.config.calibration_reference)
        if factor > 1:
            self._refine(sample, factor)
        return sample

    def _refine(self, sample: Sample, factor: int) -> None:
        """Take the latents of a run on a finer grid for the reference (NotLearnable where there is none)."""
        engine, steps = self._engine, sample.recording.steps
        scheduler = engine.pipeline.scheduler
        name = type(scheduler).__name__
        if "num_inference_steps" not in inspect.signature(sample.call.original).parameters or adds_noise(scheduler):
            raise NotLearnable(
                f"calibration_reference={factor}x needs a scheduler that adds no noise, and a pipeline that takes "
                f"num_inference_steps; {name} and {type(engine.pipeline).__name__} are not both so: leave it out"
            )
        engine.generation = None
        # Grids with both ends, and those that stop one step before the end.
        for count in (factor * (steps - 1) + 1, factor * steps):
            engine.observer = finer = Finer(factor, sample.recording.timesteps)
            try:
                result = sample.call.again(num_inference_steps=count)
                latents = finer.latents()
            except OtherGrid:
                continue
            finally:
                engine.observer = None
            sample.reference = [sample.recording.layout.fold(each) for each in latents]
            sample.pixels = pixels_of(result)
            return
        raise NotLearnable(
            f"calibration_reference={factor}x: {name} has no grid of {factor} times the steps that contains this one; "
            "leave it out"
        )

    # -- plans --------------------------------------------------------------------------------------------------------

    def _joined(self, known: Calibration | None, samples: list[Sample]) -> Calibration:
        """Join what was known with what new recordings say."""
        first, recording = samples[0], samples[0].recording
        if known is not None and known.steps != recording.steps:  # the pipeline was asked to end elsewhere
            known = None
        gram: Gram | None = None if known is None else known.gram
        for sample in samples:
            gram = add_grams(gram, sample.recording.gram())
        assert gram is not None
        half = self._engine.half_batch
        notes = {"batch": recording.images, "shape": list(recording.latents[0].shape[1:])}
        return Calibration(
            first.document,
            first.key,
            gram,
            (0 if known is None else known.images) + sum(sample.recording.images for sample in samples),
            recording.layout.places,
            _timing([sample.recording for sample in samples], half.seconds if half.names else None),
            {} if known is None else known.learned,
            notes if known is None else known.notes | notes,
            None if half.names is None else sorted(half.names, key=str),
            len(recording.layout.places) == 2 and (not recording.layout.halves or half.names is not None),
        )

    def _plans(self, calibration: Calibration, samples: list[Sample]) -> list[Plan]:
        """Choose the plans to learn at the first use."""
        goal = self._engine.goal
        if goal.by_quality:
            self._search_quality(calibration, samples)
            return []
        try:
            apart = goal.parts(calibration)
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
        apart = self._engine.goal.parts(calibration)
        if units >= FULL * calibration.steps:
            return [Plan.full(calibration.steps)]
        whole = max(1, units // FULL)
        spent = units if apart else FULL * whole
        plans = [Scheduler.of(calibration.gram, spent, apart, emphasis).plan(spent) for emphasis in EMPHASES]
        if apart:
            plans.append(Scheduler.of(calibration.gram, FULL * whole, False).plan(FULL * whole))
        plans.append(even_placement(calibration.steps, whole))
        return self._engine.agreement.first(list({plan.digest: plan for plan in plans}.values()))

    def _learn_budgets(
        self, calibration: Calibration, samples: list[Sample], budgets: list[int], progress: Callable[[], None]
    ) -> None:
        goal = self._engine.goal
        if goal.by_quality:
            self._search_quality(calibration, samples)
        else:
            budgets = [goal.units(calibration.steps, calibration.timing, goal.parts(calibration)), *budgets]
        kept = set(calibration.learned)
        for units in dict.fromkeys(budgets):
            fitted = []
            for plan in self.placements(calibration, units):
                fitted.append(calibration.learned.get(plan.digest) or self.fit(calibration, plan, samples))
                progress()
            # What does not beat another placement of the same cost is not kept.
            kept.add(max(fitted, key=lambda known: known.standing).plan.digest)
        calibration.learned = {digest: calibration.learned[digest] for digest in calibration.learned if digest in kept}

    def _search_quality(self, calibration: Calibration, samples: list[Sample]) -> None:
        """Find the fewest evaluations whose predicted PSNR is enough, by bisection."""
        wanted = float(self._engine.config.min_psnr or 0)
        step = 1 if self._engine.goal.parts(calibration) else FULL
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
        if plan.is_full:  # without weights; exact, unless the reference is another run
            runs = [(sample, pixels_of(sample.call.result), sample.recording.latents[-1]) for sample in samples]
            scores = self._engine.agreement.first([_psnr(*run) for run in runs])
            learned.psnr, learned.decoded = [each for psnr, _ in scores for each in psnr], scores[0][1]
            samples = []
        for sample in samples:
            raw = None if self._engine.config.replay else sample.recording.raw
            fit = Fit(sample.reference, learned.equations, raw)
            result, last = self._run(sample, plan, fit)
            learned.equations, learned.weights, learned.shrinkage = fit.equations, fit.weights, fit.shrinkage
            # Searches go by it, so that a last bit of a rank's own must not send it another way.
            psnr, learned.decoded = self._engine.agreement.first(_psnr(sample, pixels_of(result), last))
            learned.psnr += psnr
        calibration.learned[plan.digest] = learned
        return learned

    def _run(self, sample: Sample, plan: Plan, fit: Fit) -> tuple[Any, torch.Tensor]:
        engine = self._engine
        engine.generation, engine.loops = None, 0
        self._replay = (plan, fit, sample)
        try:
            result = sample.call.again()
            generation = engine.generation
            if generation is None or generation.broken is not None or generation.step != sample.recording.steps:
                raise NotLearnable("the pipeline took other steps when it was called again with the same arguments")
            return result, sample.recording.layout.fold(generation.last_latents).detach().float().cpu()
        finally:
            self._replay = None
            if engine.generation is not None:
                engine.generation.forget()
            engine.generation = None


def _timing(recordings: list[Recording], half_seconds: float | None) -> dict[str, float]:
    denoiser = [each for recording in recordings for each in recording.denoiser_seconds[1:]]
    whole = [each for recording in recordings for each in recording.step_seconds[1:]]
    # The first steps remember less, so that there is less to add up.
    correction = [each for recording in recordings for each in recording.correction_seconds[-(recording.steps // 2) :]]
    seconds = statistics.median(denoiser)
    return {
        "denoiser": seconds,
        "outside": max(statistics.median(whole) - seconds, 0.0),
        "correction": statistics.median(correction),
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
