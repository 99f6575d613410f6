"""A pool of real gloo processes that run one job after another: importing costs seconds a process."""

from __future__ import annotations

import copy
import datetime
import hashlib
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xfuser.config import ParallelConfig
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.model_executor.adapters import dit
from xfuser.model_executor.parallel import ParallelPipeline, parallelize
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline

CPU = torch.device("cpu")
SMALL = "small-dit"
START_SECONDS, JOB_SECONDS = 120, 90


@dataclass(frozen=True)
class Job:
    """One generation, on one process or on all of the pool's.

    Attributes:
        family: A model type.
        parallel: `ParallelConfig` settings.
        cache: `CacheConfig` settings.
        size: Images' height and width, for prompt models.
        guided: Whether FLUX runs a second branch.
    """

    family: str
    parallel: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    steps: int = 8
    images: int = 2
    seed: int = 0
    size: int = 64
    guided: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one rank has seen of a job."""

    images: np.ndarray
    summary: dict[str, Any]
    parameter_bytes: int

    @property
    def digest(self) -> str:
        return self.summary["plan_digest"]

    @property
    def pixels_digest(self) -> str:
        return hashlib.sha256(self.images.tobytes()).hexdigest()


@cache
def loaded(family: str) -> LoadedPipeline:
    return build_small_dit() if family == SMALL else load_pipeline(family)


def build_small_dit() -> LoadedPipeline:
    """Four blocks on 16 tokens, for tests that generate hundreds of times."""
    return LoadedPipeline(dit.build_small(), "dit", SMALL, torch.float32)


_MESHES: OrderedDict[ParallelConfig, ParallelMesh] = OrderedDict()
MESHES_KEPT = 2  # idle groups take processor time from all other tests, and new ones their time to make


def mesh_of(config: ParallelConfig) -> ParallelMesh:
    """One of the latest meshes, or a new one; collective."""
    if config not in _MESHES:
        _MESHES[config] = ParallelMesh(config, CPU)
    _MESHES.move_to_end(config)
    while len(_MESHES) > MESHES_KEPT:
        _MESHES.popitem(last=False)[1].close()
    return _MESHES[config]


def generate(job: Job, of: LoadedPipeline) -> np.ndarray:
    """The job's images, float [N, H, W, C], with whatever is attached."""
    seeds = [job.seed + index for index in range(job.images)]
    if of.spec.conditioned_on == "label":
        return of.generate(list(range(job.images)), seeds, job.steps)
    prompts = [f"fox number {index}" for index in range(job.images)]
    if not job.guided:
        return of.generate(prompts, seeds, job.steps, height=job.size, width=job.size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = of.pipeline(
        prompt=prompts,
        negative_prompt=["a cat"] * job.images,
        true_cfg_scale=2.0,
        num_inference_steps=job.steps,
        generator=generators,
        height=job.size,
        width=job.size,
        output_type="np",
        max_sequence_length=64,
    )
    return np.asarray(output.images, dtype=np.float32)


def run(job: Job, prepare: Callable[[ParallelPipeline], None] | None = None) -> Outcome:
    """Run a job here; collective where several processes share it."""
    of = loaded(job.family)
    config = ParallelConfig(**job.parallel)
    whole = of.pipeline.transformer
    if config.pipefusion_parallel_degree > 1:  # a stage gives the other stages' weights away
        of.pipeline.transformer = copy.deepcopy(whole)
    spread = None
    try:
        spread = parallelize(of.pipeline, mesh_of(config), **job.cache)
        if prepare is not None:
            prepare(spread)
        images = generate(job, of)
        return Outcome(images, spread.summary(), spread.parameter_bytes())
    finally:
        if spread is not None:
            spread.remove()
        of.pipeline.transformer = whole


@cache
def _alone(key: str) -> Outcome:
    return run(_JOBS[key])


_JOBS: dict[str, Job] = {}


def alone(job: Job) -> Outcome:
    """The same job on one process, run once."""
    single = Job(job.family, {}, job.cache, job.steps, job.images, job.seed, job.size, job.guided)
    _JOBS[repr(single)] = single
    return _alone(repr(single))


def _work(rank: int, world: int, store: str, connections: list[Any]) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=JOB_SECONDS)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=limit)
    connection = connections[rank]
    connection.send(("ready", None))
    while True:
        function, arguments = connection.recv()
        if function is None:
            break
        try:
            connection.send(("done", function(*arguments)))
        except Exception:
            connection.send(("failed", traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """So many processes, each waiting for the next job."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world = world
        self._ours, theirs = zip(*[mp.Pipe() for _ in range(world)], strict=True)
        context = mp.get_context("spawn")
        self._processes = [
            context.Process(target=_work, args=(rank, world, str(folder / "store"), list(theirs)), daemon=True)
            for rank in range(world)
        ]
        for process in self._processes:
            process.start()
        self._collect(START_SECONDS)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function of this package's test modules returns on every rank."""
        for connection in self._ours:
            connection.send((function, arguments))
        return self._collect(JOB_SECONDS)

    def run(self, job: Job) -> list[Outcome]:
        return self.call(run, job)

    def close(self) -> None:
        for connection, process in zip(self._ours, self._processes, strict=True):
            if process.is_alive():
                connection.send((None, ()))
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()

    def _collect(self, seconds: float) -> list[Any]:
        deadline, answers = time.monotonic() + seconds, []
        for rank, connection in enumerate(self._ours):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                for process in self._processes:
                    process.kill()
                raise AssertionError(f"rank {rank} gave no answer within {seconds:.0f} s: the processes hang")
            answers.append(connection.recv())
        failures = [f"rank {rank}: {what}" for rank, (kind, what) in enumerate(answers) if kind == "failed"]
        assert not failures, "\n".join(failures)
        return [what for _, what in answers]
