"""Runs the rows side by side: same seeds, one process, alternating batch by batch, warm-up not counted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmark.rows import Row
from xfuser.core.distributed.environment import synchronize
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_pipeline
from xfuser.model_executor.pipelines import LoadedPipeline

DEFAULT_PROMPTS = (
    "a lighthouse on a cliff at dusk",
    "a bowl of ripe cherries on a wooden table",
    "an old tram in a narrow street, rain",
    "a red fox asleep in the snow",
)
WARMUP_SEED = 1 << 30  # far from any seed a user counts up from


@dataclass
class Run:
    """What one row has produced so far."""

    row: Row
    images: list[np.ndarray] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    hit_rates: list[float] = field(default_factory=list)
    flops_saved: list[float] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    non_finite: int = 0
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def pixels(self) -> np.ndarray:
        return np.concatenate(self.images)

    @property
    def seconds(self) -> float:
        return float(sum(self.batch_seconds))

    @property
    def images_per_second(self) -> float:
        return sum(self.batch_sizes) / self.seconds


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


def measure(loaded: LoadedPipeline, rows: list[Row], sampling: Sampling) -> list[Run]:
    """Generate all images of all rows.

    Raises:
        RuntimeError: A row's method was not active, produced something that is no image, or its images contradict its
            decisions. A method that raises is not caught: its row cannot be reported.
    """
    runs = [Run(row) for row in rows]
    batches = [
        (start, min(sampling.batch_size, sampling.num_images - start))
        for start in range(0, sampling.num_images, sampling.batch_size)
    ]
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("warm-up", total=len(rows) * (len(batches) + 1))
        for run in runs:
            progress.update(task, description=f"warm-up {run.row.method}")
            _generate(loaded, run, runs, sampling, 0, batches[0][1], WARMUP_SEED, counted=False)
            progress.advance(task)
        for index, (start, size) in enumerate(batches):
            for run in _in_turn(runs, index):
                progress.update(task, description=run.row.method)
                _generate(loaded, run, runs, sampling, start, size, sampling.seed, counted=True)
                progress.advance(task)
    for run in runs:
        _check(run, runs)
    return runs


def _in_turn(runs: list[Run], index: int) -> list[Run]:
    """Every batch begins with another base method; a corrected row still follows the base whose spending it matches."""
    groups: dict[str | None, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.row.base, []).append(run)
    ordered = list(groups.values())
    shift = index % len(ordered)
    return [run for group in ordered[shift:] + ordered[:shift] for run in group]


def _generate(
    loaded: LoadedPipeline,
    run: Run,
    runs: list[Run],
    sampling: Sampling,
    start: int,
    size: int,
    seed: int,
    counted: bool,
) -> None:
    row = run.row
    steps = sampling.num_inference_steps
    if row.matched:
        row = row.with_budget(_spent_by_base(row, runs))
    if row.fewer_steps:
        steps = max(1, round(steps * _spent_by_base(row, runs)))
    config = row.config
    engine: CacheEngine | None = None
    if config.use_cache is not None:
        engine = apply_cache_on_pipeline(loaded.pipeline, **vars(config))
        engine.learn_flops(run.summary.get("flops"))
    try:
        device = loaded.pipeline.device
        synchronize(device)
        begin = time.perf_counter()
        images = loaded.generate(
            conditions_of(loaded, sampling, start, size),
            [seed + index for index in range(start, start + size)],
            steps,
            sampling.guidance_scale,
            sampling.height,
            sampling.width,
        )
        synchronize(device)
        seconds = time.perf_counter() - begin
        summary = engine.summary() if engine else {"hit_rate": 0.0, "flops_saved": 0.0, "non_finite": 0}
        flops = engine.known_flops() if engine else None
    finally:
        if engine is not None:
            engine.remove()
    run.summary = summary | {"flops": flops}
    if not counted:
        return
    run.images.append(images)
    run.batch_seconds.append(seconds)
    run.batch_sizes.append(size)
    run.steps.append(steps)
    run.hit_rates.append(summary["hit_rate"])
    run.flops_saved.append(summary["flops_saved"])
    run.non_finite += summary["non_finite"]
    if summary.get("prediction_coverage") is not None:
        run.coverage.append(summary["prediction_coverage"])


def _spent_by_base(row: Row, runs: list[Run]) -> float:
    base = next(run for run in runs if run.row.method == row.base)
    return 1 - base.summary["hit_rate"]


def _check(run: Run, runs: list[Run]) -> None:
    method = run.row.method
    if not all(np.isfinite(batch).all() for batch in run.images):
        raise RuntimeError(f"{method}: some images hold numbers that are not finite")
    if run.row.config.use_cache is None:
        return
    if "plan" not in run.summary or run.summary["steps"] == 0:
        raise RuntimeError(f"{method}: the cache was attached, but saw no step; nothing is reported under its name")
    if run.row.config.mode != "blend" and sum(run.hit_rates) == 0:
        raise RuntimeError(
            f"{method}: it never hit, so its row would be another name for None; raise its threshold or budget"
        )
    for other in runs:
        if other is run or other.row.config.use_cache is None or other.summary.get("plan") == run.summary["plan"]:
            continue
        if torch.equal(torch.from_numpy(other.images[-1]), torch.from_numpy(run.images[-1])):
            raise RuntimeError(
                f"{method} and {other.row.method} decided differently, and yet their images are the same"
            )
