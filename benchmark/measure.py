"""Runs the rows side by side: same seeds, one process, alternating batch by batch, warm-up not counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmark.matching import ALLOWED, RETRY_LIMIT, SEARCH_LIMIT, Match, dial_of, search
from benchmark.outcomes import Run, Unreportable, check, leave_out
from benchmark.rows import Row
from xfuser.config import CacheConfig
from xfuser.core.distributed.environment import synchronize
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.core.distributed.shutdown import one_line
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_pipeline
from xfuser.model_executor.cache.adacorrection.trajectory import TrajectoryEngine, attach_trajectory
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration
from xfuser.model_executor.parallel import ParallelPipeline, parallelize
from xfuser.model_executor.pipelines import LoadedPipeline

DEFAULT_PROMPTS = (
    "a lighthouse on a cliff at dusk",
    "a bowl of ripe cherries on a wooden table",
    "an old tram in a narrow street, rain",
    "a red fox asleep in the snow",
)
WARMUP_SEED = 1 << 30  # far from any seed a user counts up from
HOPELESS = 0.05  # share of the FLOPs by which a setting at its end misses the base, so that the run need not begin


@dataclass(frozen=True)
class Sampling:
    """What every row generates."""

    num_images: int
    batch_size: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    height: int | None = None
    width: int | None = None


def conditions_of(loaded: LoadedPipeline, sampling: Sampling, start: int, size: int) -> list[Any]:
    """Labels or prompts of the images start … start + size − 1, all classes in turn."""
    if loaded.spec.conditioned_on == "label":
        classes = loaded.num_classes()
        return [index % classes for index in range(start, start + size)]
    return [sampling.prompts[index % len(sampling.prompts)] for index in range(start, start + size)]


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Call, and tell the seconds that it took and its result."""
    synchronize(device)
    begin = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - begin, result


@dataclass(frozen=True)
class Batch:
    """Images start … start + size − 1, from the noise of seed + their numbers."""

    start: int
    size: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """One row's batch: images [N, H, W, C], the seconds it took, its steps, and the engine's summary."""

    images: np.ndarray
    seconds: float
    steps: int
    summary: dict[str, Any]

    @property
    def saved(self) -> float:
        return self.summary["flops_saved"]


def measure(
    loaded: LoadedPipeline,
    rows: list[Row],
    sampling: Sampling,
    see: Callable[[list[Run], list[Any]], None] | None = None,
    lenient: bool = False,
    mesh: ParallelMesh | None = None,
) -> list[Run]:
    """Generate all images of all rows.

    Args:
        loaded: The model.
        rows: The uncached row first, and every base method before what belongs to it.
        sampling: What is generated.
        see: Called after every batch with the runs, whose newest images are of that batch, and its conditions.
        lenient: Take a row that cannot be reported, or never hits, for one of many settings and not for a failure.
        mesh: The ranks that every row is spread over; all of them call this, and go through the same batches, since
            what they decide by is the same on each: hit rates, FLOPs and images, never seconds.

    Returns:
        A run for every row. What nothing can be reported of says so in its ``left_out``, in a line: an exception, a
        method that was not active, that did not match what it had to, or that produced something that is no image. The
        other rows go on without it.

    Raises:
        Exception: The uncached row failed, which all others are compared with; or a row failed on several ranks, where
            the others cannot know of it.
    """
    return _Measurement(loaded, rows, sampling, lenient, mesh).run(see)


class _Measurement:
    """The runs of one comparison, and how each is brought forward by a batch."""

    def __init__(
        self, loaded: LoadedPipeline, rows: list[Row], sampling: Sampling, lenient: bool, mesh: ParallelMesh | None
    ) -> None:
        self.mesh = mesh
        self.loaded, self.sampling, self.lenient = loaded, sampling, lenient
        self.runs = [Run(row) for row in rows]
        for run in self.runs:
            run.match = Match(dial_of(run.row)) if run.row.searched else None
        starts = range(0, sampling.num_images, sampling.batch_size)
        sizes = [min(sampling.batch_size, sampling.num_images - start) for start in starts]
        self.batches = [Batch(start, size, sampling.seed) for start, size in zip(starts, sizes, strict=True)]

    def run(self, see: Callable[[list[Run], list[Any]], None] | None) -> list[Run]:
        columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        searches = sum(run.match is not None for run in self.runs)
        total = len(self.runs) * (len(self.batches) + 1) + searches * (SEARCH_LIMIT - 1)
        with Progress(*columns, disable=self.mesh is not None and not self.mesh.is_first) as progress:
            task = progress.add_task("warm-up", total=total)
            for run in self.runs:
                with self._watched(run):
                    progress.update(task, description=f"{'match' if run.match else 'warm-up'} {run.row.method}")
                    self._warm_up(run, lambda: progress.advance(task))
            done = len(self.runs) + searches * (SEARCH_LIMIT - 1)
            progress.update(task, completed=done)
            for index, batch in enumerate(self.batches):
                for run in _in_turn(self.runs, index):
                    progress.update(task, description=run.row.method)
                    with self._watched(run):
                        self._count(run, batch)
                    progress.advance(task)
                if see is not None:
                    see([run for run in self.runs if run.left_out is None], self._conditions(batch))
        for run in self.runs:
            with self._watched(run):
                check(run, self.runs, self.lenient)
        return self.runs

    @contextmanager
    def _watched(self, run: Run) -> Iterator[None]:
        """Takes a row that fails, or cannot be reported, out of the comparison; all others go on."""
        try:
            yield
        except Unreportable as error:
            if run.row.base is None:
                raise
            leave_out(run, self.runs, str(error), failed=not self.lenient)
        except Exception as error:
            if run.row.base is None or (self.mesh is not None and self.mesh.world_size > 1):
                raise
            leave_out(run, self.runs, f"{run.row.method}: {one_line(error)}", failed=True)

    def _warm_up(self, run: Run, advance: Callable[[], None]) -> None:
        """The first batch, with other noise; where a setting is to be found, until it is."""
        if run.left_out is not None:
            return
        batch = replace(self.batches[0], seed=WARMUP_SEED)
        if run.match is None:
            self._generate(run, run.row.config, batch)
            advance()
            return
        base, dial = self._base(run).summary, run.match.dial
        target = base["flops_saved"]

        def trial(position: float) -> Outcome:
            advance()
            return self._generate(run, self._turned(run, position), batch)

        start = dial.guess(target, base["hit_rate"], target)
        # Where whole steps are spent, a single batch can come no nearer than half of one.
        close = max(ALLOWED / 4, 0.5 / self.sampling.num_inference_steps if dial.whole_steps else 0.0)
        found = search(dial, start, dial.step, target, close, SEARCH_LIMIT if target > 0 else 1, trial)
        if target > 0 and not found.bracketed and abs(found.attempt.saved - target) > HOPELESS:
            raise Unreportable(
                f"{run.row.method}: at {dial.name}={dial.value(found.position):.3g} it saves {found.attempt.saved:.3f} "
                f"of the FLOPs, and {run.row.base} {target:.3f}; no setting matches that: lower the base method's "
                "threshold, or take more steps"
            )

    def _count(self, run: Run, batch: Batch) -> None:
        """One batch that is reported."""
        if run.left_out is not None:
            return
        config = run.row.config
        if run.match is None:
            if run.row.matched:
                config = replace(config, adacorr_budget=self._spent_by_base(run))
            self._accept(run, self._generate(run, config, batch), batch)
            return
        match, base = run.match, self._base(run).summary
        needed = match.needed(base["flops_saved"], batch.size)
        start = match.dial.guess(needed, base["hit_rate"], base["flops_saved"])
        # What the batches before it leave open, the last one has to close; a missed one is generated again.
        found = search(
            match.dial,
            start,
            match.dial.step / 4,
            needed,
            match.slack(batch.size),
            RETRY_LIMIT if batch is self.batches[-1] else 1,
            lambda position: self._generate(run, self._turned(run, position), batch),
        )
        match.take(batch.size, base["flops_saved"], found.attempt.saved, match.dial.value(found.position))
        self._accept(run, found.attempt, batch)

    def _generate(self, run: Run, config: CacheConfig, batch: Batch) -> Outcome:
        sampling, loaded = self.sampling, self.loaded
        steps = sampling.num_inference_steps
        if run.row.fewer_steps:
            steps = max(1, round(steps * self._spent_by_base(run)))
        attached, engine = self._attach(run, config)
        if engine is not None:
            engine.learn_flops(run.flops)
        try:
            device = loaded.pipeline.device
            synchronize(device)
            begin = time.perf_counter()
            images = loaded.generate(
                self._conditions(batch),
                [batch.seed + index for index in range(batch.start, batch.start + batch.size)],
                steps,
                guidance_scale=sampling.guidance_scale,
                height=sampling.height,
                width=sampling.width,
            )
            synchronize(device)
            seconds = time.perf_counter() - begin
            saved = 1 - steps / sampling.num_inference_steps
            cached = attached is not None and config.use_cache is not None
            summary = attached.summary() if cached else {"hit_rate": 0.0, "flops_saved": saved, "non_finite": 0}
            run.flops = engine.known_flops() if engine else None
        finally:
            if attached is not None:
                attached.remove()
        if not np.isfinite(images).all():
            raise Unreportable(f"{run.row.method}: some images hold numbers that are not finite")
        run.summary = summary
        return Outcome(images, seconds, steps, summary)

    def _attach(
        self, run: Run, config: CacheConfig
    ) -> tuple[CacheEngine | ParallelPipeline | TrajectoryEngine | None, CacheEngine | None]:
        """What has to be removed again, and the engine in it; nothing is attached to an uncached single process."""
        if run.row.trajectory is not None:
            known = Calibration.load(run.row.trajectory)
            least = min(each.plan.cost for each in known.learned.values())
            budget = max(self._spent_by_base(run), least)
            return attach_trajectory(self.loaded.pipeline, adacorr_budget=budget, calibration=run.row.trajectory), None
        if self.mesh is not None and self.mesh.world_size > 1:
            spread = parallelize(self.loaded.pipeline, self.mesh, **vars(config))
            return spread, spread.engine
        engine = None if config.use_cache is None else apply_cache_on_pipeline(self.loaded.pipeline, **vars(config))
        return engine, engine

    def _accept(self, run: Run, outcome: Outcome, batch: Batch) -> None:
        if not run.row.kept:
            run.images.clear()
        run.summary = outcome.summary
        run.images.append(outcome.images)
        run.batch_seconds.append(outcome.seconds)
        run.batch_sizes.append(batch.size)
        run.steps.append(outcome.steps)
        run.hit_rates.append(outcome.summary["hit_rate"])
        run.flops_saved.append(outcome.saved)
        run.non_finite += outcome.summary["non_finite"]
        if outcome.summary.get("prediction_coverage") is not None:
            run.coverage.append(outcome.summary["prediction_coverage"])

    def _turned(self, run: Run, position: float) -> CacheConfig:
        assert run.match is not None
        return replace(run.row.config, **{run.match.dial.name: run.match.dial.value(position)})

    def _conditions(self, batch: Batch) -> list[Any]:
        return conditions_of(self.loaded, self.sampling, batch.start, batch.size)

    def _base(self, run: Run) -> Run:
        return next(each for each in self.runs if each.row.method == run.row.base)

    def _spent_by_base(self, run: Run) -> float:
        return 1 - self._base(run).summary["hit_rate"]


def _in_turn(runs: list[Run], index: int) -> list[Run]:
    """Every batch begins with another base method; a corrected row still follows the base whose spending it matches."""
    groups: dict[str | None, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.row.base, []).append(run)
    ordered = list(groups.values())
    shift = index % len(ordered)
    return [run for group in ordered[shift:] + ordered[:shift] for run in group]
