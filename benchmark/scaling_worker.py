"""One process of `benchmark/scaling.py`: measures every mesh of its job's size, and the links between its ranks."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xfuser.core.console import quiet_libraries

quiet_libraries()

from diffusers.utils.logging import disable_progress_bar  # noqa: E402

from xfuser.config import ParallelConfig  # noqa: E402
from xfuser.core.distributed.clock import Clock  # noqa: E402
from xfuser.core.distributed.environment import (  # noqa: E402
    choose_device,
    describe_environment,
    join_processes,
    leave_processes,
    synchronize,
)
from xfuser.core.distributed.exchange import SumExchange  # noqa: E402
from xfuser.core.distributed.mesh import ParallelMesh  # noqa: E402
from xfuser.core.files import write_json  # noqa: E402
from xfuser.model_executor.adapters import BoundArguments, spec_of  # noqa: E402
from xfuser.model_executor.cache import apply_cache_on_pipeline  # noqa: E402
from xfuser.model_executor.cache.patching import scheduler_calls  # noqa: E402
from xfuser.model_executor.parallel import parallelize  # noqa: E402
from xfuser.model_executor.parallel.apply import ParallelPipeline  # noqa: E402
from xfuser.model_executor.parallel.guidance import sample_of  # noqa: E402
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline  # noqa: E402

ALONE = "one process"
MESHES: dict[int, dict[str, dict[str, Any]]] = {
    1: {ALONE: {}},
    2: {
        "ulysses 2": {"ulysses_degree": 2},
        "ring 2": {"ring_degree": 2},
        "pipefusion 2": {"pipefusion_parallel_degree": 2},
        "cfg 2": {"use_cfg_parallel": True},
        "data 2": {"data_parallel_degree": 2},
    },
    4: {
        "ulysses 4": {"ulysses_degree": 4},
        "ring 4": {"ring_degree": 4},
        "pipefusion 4": {"pipefusion_parallel_degree": 4},
        "ring 2 × ulysses 2": {"ring_degree": 2, "ulysses_degree": 2},
        "pipefusion 2 × ulysses 2": {"pipefusion_parallel_degree": 2, "ulysses_degree": 2},
        "cfg 2 × ulysses 2": {"use_cfg_parallel": True, "ulysses_degree": 2},
        "data 4": {"data_parallel_degree": 4},
    },
}
KINDS = ("all", "evaluated", "skipped")
WARM_STEPS = 1  # of each generation, that are not counted: the first one prepares, and is synchronous under PipeFusion
SMALL, LARGE = 1 << 10, 1 << 20  # bytes a rank, of the messages that latency and bandwidth are read from


@dataclass
class Watch:
    """When each step of a generation ended, and what the clock had booked until then."""

    clock: Clock
    device: torch.device
    times: list[float] = field(default_factory=list)
    booked: list[dict[str, float]] = field(default_factory=list)

    def starts(self) -> None:
        self.times.clear()
        self.booked.clear()
        self.ends()

    def ends(self) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        self.booked.append(dict(self.clock.seconds))

    def step(self, index: int) -> dict[str, float]:
        """Seconds of a step by category; what no category has is the rest."""
        before, after = self.booked[index], self.booked[index + 1]
        spent = {name: after[name] - before.get(name, 0.0) for name in after}
        total = self.times[index + 1] - self.times[index]
        return spent | {"total": total, "rest": total - sum(spent.values())}


@dataclass(frozen=True)
class Job:
    """What every mesh generates."""

    model_type: str
    model: str | None
    device: torch.device
    images: int
    steps: int
    repeats: int
    cache: dict[str, Any]

    def generate(self, loaded: LoadedPipeline, images: int) -> None:
        label = loaded.spec.conditioned_on == "label"
        conditions: list[Any] = [index % loaded.num_classes() if label else "a red fox" for index in range(images)]
        loaded.generate(conditions, list(range(images)), self.steps)


def evaluated_share(summary: dict[str, Any], step: int) -> float:
    rows = [branch[step] for branch in summary["plan"].values()]
    return sum(map(sum, rows)) / sum(map(len, rows))


def run_once(spread: ParallelPipeline, job: Job, loaded: LoadedPipeline, images: int) -> dict[str, Any]:
    """Mean seconds a step of one generation on this rank, by kind of step and category."""
    watch = Watch(spread.clock, job.device)
    spread.clock.reset()
    # On top of the engine's own, and taken off before it.
    marks = scheduler_calls(loaded.pipeline.scheduler, watch.starts, watch.ends)
    try:
        job.generate(loaded, images)
    finally:
        for mark in reversed(marks):
            mark.undo()
    summary = spread.summary()
    seen: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for index in range(WARM_STEPS, job.steps):
        share, step = evaluated_share(summary, index), watch.step(index)
        seen["all"].append(step)
        if share == 1:
            seen["evaluated"].append(step)
        elif share <= 1 / summary["blocks"]:  # First Block Cache looks at one block
            seen["skipped"].append(step)
    return {kind: mean_of(steps) for kind, steps in seen.items() if steps}


def mean_of(each: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in each for name in one)
    return {name: sum(one.get(name, 0.0) for one in each) / len(each) for name in names}


class Decisions:
    """What the host spends on deciding, without the exchange."""

    def __init__(self, spread: ParallelPipeline) -> None:
        self.seconds, self.calls = 0.0, 0
        self._clock = spread.clock
        planner = spread.engine.planner
        original = planner.plan

        def decide(*args: Any, **kwargs: Any) -> Any:
            begin, booked = time.perf_counter(), self._exchanged()
            result = original(*args, **kwargs)
            self.seconds += time.perf_counter() - begin - (self._exchanged() - booked)
            self.calls += 1
            return result

        planner.plan = decide  # it goes when the engine does

    def _exchanged(self) -> float:
        return self._clock.seconds.get("statistics", 0.0)

    @property
    def mean(self) -> float:
        return self.seconds / max(self.calls, 1)


def sizes_of(job: Job, loaded: LoadedPipeline) -> dict[str, Any]:
    """What the cost model needs to know of the model, seen in one generation of one image."""
    transformer = loaded.pipeline.transformer
    spec = spec_of(transformer)
    block, seen = spec.blocks(transformer)[0], {}
    arguments = BoundArguments(block.forward)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams = [arguments.read(name, args, kwargs) for name in spec.groups[0].takes]
        seen["branches"] = streams[0].shape[0]
        seen["tokens"], seen["width"] = sum(each.shape[1] for each in streams), streams[0].shape[2]

    def after(module: Any, args: Any, output: Any) -> None:
        sample = sample_of(output)
        seen["output_numbers"] = sample.numel() / sample.shape[0]

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True), transformer.register_forward_hook(after)]
    engine = apply_cache_on_pipeline(loaded.pipeline)
    try:
        job.generate(loaded, 1)
    finally:
        for hook in hooks:
            hook.remove()
        engine.remove()
    (flops,) = engine.known_flops().values()
    return seen | {
        "heads": spec.heads(transformer),
        "block_flops": [each / seen["branches"] for each in flops.blocks],
        "outside_flops": (flops.total - sum(flops.blocks)) / seen["branches"],
    }


def attach(loaded: LoadedPipeline, mesh: ParallelMesh, settings: dict[str, Any], known: Any) -> ParallelPipeline:
    spread = parallelize(loaded.pipeline, mesh, timed=True, **settings)
    spread.engine.learn_flops(known)  # counting them again would be measured as computing
    return spread


def measure_mesh(job: Job, mesh: ParallelMesh, images: int) -> dict[str, Any]:
    """Alternating generations without and with the cache; the first pair is not counted."""
    loaded = load_pipeline(job.model_type, job.model, job.device)
    variants = {"uncached": {}, "cached": job.cache}
    repeats: dict[str, list[Any]] = {name: [] for name in variants}
    known: dict[str, Any] = dict.fromkeys(variants)
    facts: dict[str, Any] = {}
    for repeat in range(job.repeats + 1):
        for name, settings in variants.items():
            spread = attach(loaded, mesh, settings, known[name])
            decisions = Decisions(spread)
            mine = run_once(spread, job, loaded, images)
            every = all_ranks(mine)
            if repeat:
                kinds = [kind for kind in KINDS if all(kind in each for each in every)]
                repeats[name].append({kind: mean_of([each[kind] for each in every]) for kind in kinds})
            summary, known[name] = spread.summary(), spread.engine.known_flops()
            names = ("collectives_per_step", "bytes_per_step", "hit_rate", "blocks", "calls", "evaluated", "steps")
            facts[name] = {each: summary[each] for each in names}
            facts[name]["decision_seconds"] = decisions.mean
            digests = spread.gather(summary["plan_digest"])
            facts[name]["digests_equal"] = len(set(digests)) == 1
            spread.remove()
    return {"images": images, "facts": facts, "repeats": repeats}


def all_ranks(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def median_seconds(call: Callable[[], Any], device: torch.device, times: int = 60) -> float:
    seconds = []
    for _ in range(times + 5):
        dist.barrier()
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[5:])


def busy_seconds(call: Callable[[], Any], device: torch.device, times: int = 100) -> float:
    """Mean seconds of a collective that every rank comes to from about a millisecond of computing, as blocks do.

    Ranks that share cores with others do not come at the same time; a mean, because a step adds them up.
    """
    matrix = torch.zeros(400, 400, device=device)
    seconds = 0.0
    for _ in range(times):
        matrix @ matrix
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        seconds += time.perf_counter() - begin
    return seconds / times


def probe_links(device: torch.device, numbers: int) -> dict[str, float]:
    """What an all-to-all and the exchange of sums take when every rank is ready, and when they come from computing."""
    world = dist.get_world_size()
    seconds = {}
    for size in (SMALL, LARGE):
        sent = torch.zeros(size // 4, device=device)
        received = torch.empty_like(sent)
        seconds[size] = median_seconds(lambda s=sent, r=received: dist.all_to_all_single(r, s), device)
    share = (world - 1) / world  # of a rank's tensor that leaves it
    bandwidth = share * (LARGE - SMALL) / max(seconds[LARGE] - seconds[SMALL], 1e-9)
    exchange = SumExchange(dist.new_group(list(range(world)), backend="gloo"))
    vector = torch.zeros(max(numbers, 1))
    small = torch.zeros(SMALL // 4, device=device)
    got = torch.empty_like(small)
    return {
        "busy_latency": busy_seconds(lambda: dist.all_to_all_single(got, small), device),
        "busy_exchange": busy_seconds(lambda: exchange.sum(vector), device),
        "latency": max(seconds[SMALL] - share * SMALL / bandwidth, 0.0),
        "bandwidth": bandwidth,
        "exchange": median_seconds(lambda: exchange.sum(vector), device),
    }


def fitting(job: Job, config: ParallelConfig) -> str | None:
    """Why a mesh does not fit the model; ``None`` where it does."""
    loaded = load_pipeline(job.model_type, job.model)
    spec = spec_of(loaded.pipeline.transformer)
    if config.use_cfg_parallel and spec.guidance != "batch":
        return f"{job.model_type} evaluates one branch a step here"
    try:
        blocks = spec.blocks(loaded.pipeline.transformer)
        config.check_model(spec.heads(loaded.pipeline.transformer), len(blocks))
    except ValueError as error:
        return str(error)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", help="JSON of the job")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    settings = json.loads(args.settings)
    disable_progress_bar()
    device = choose_device(settings["device"])
    if device.type == "cpu":
        torch.set_num_threads(1)  # a process stands for a device
    join_processes(device, 600)
    job = Job(**(settings | {"device": device}))
    world = dist.get_world_size()
    document: dict[str, Any] = {"environment": describe_environment(device), "meshes": {}, "unfit": {}}
    for name, degrees in MESHES[world].items():
        config = ParallelConfig(**degrees)
        reason = fitting(job, config)
        if reason is not None:
            document["unfit"][name] = reason
            continue
        document["meshes"][name] = measure_mesh(job, ParallelMesh(config, device), job.images)
        if world == 1:
            document["sizes"] = sizes_of(job, load_pipeline(job.model_type, job.model, job.device))
            fewer = max(1, job.images // 2)
            document["half"] = measure_mesh(job, ParallelMesh(config, device), fewer)
    if world > 1:
        facts = [each["facts"]["cached"]["bytes_per_step"] for each in document["meshes"].values()]
        document["links"] = all_ranks(probe_links(device, int(max(facts)) // 4))[0]
    if dist.get_rank() == 0:
        write_json(args.output, document)
    leave_processes()


if __name__ == "__main__":
    main()
