"""Generate images with a cached pipeline, batch by batch, losing nothing on a failure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xfuser.core.distributed.environment import synchronize
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.core.distributed.shutdown import LostPeer, is_lost, reason_of
from xfuser.core.tokens import part
from xfuser.model_executor.parallel import AlonePipeline, ParallelPipeline
from xfuser.model_executor.pipelines.loading import LoadedPipeline
from xfuser.model_executor.pipelines.outputs import Outputs, save_image

__all__ = ["Generation", "batches_of", "call_of", "generate_batches", "generate_images", "save_image"]


@dataclass(frozen=True)
class Generation:
    """What is to be generated: image i has the condition conditions[i % len(conditions)] and the seed seed + i."""

    conditions: list[Any]
    num_images: int
    batch_size: int
    seed: int
    num_inference_steps: int
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompts: list[str] | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None


def batches_of(request: Generation, replicas: int = 1, index: int = 0) -> list[range]:
    """The batches of one data-parallel replica: together, a contiguous part of the images.

    Raises:
        ValueError: There are more replicas than images.
    """
    if replicas > request.num_images:
        raise ValueError(
            f"--data_parallel_degree {replicas}: there are only {request.num_images} images; ask for more, or lower it"
        )
    own = part(request.num_images, replicas, index)
    starts = range(own.start, own.stop, request.batch_size)
    return [range(start, min(start + request.batch_size, own.stop)) for start in starts]


def remaining_batches(request: Generation, replicas: int, finished: frozenset[int]) -> list[list[range]]:
    """List every replica's batches of which an image is missing; its last one, where none is.

    A batch is made as a whole, since what a cache decides depends on all of its images.
    """
    schedule = [batches_of(request, replicas, index) for index in range(replicas)]
    return [[batch for batch in own if not finished.issuperset(batch)] or own[-1:] for own in schedule]


def generate_batches(
    loaded: LoadedPipeline, request: Generation, batches: Sequence[range] | None = None, quiet: bool = False
) -> Iterator[tuple[range, np.ndarray, float]]:
    """Generate batch by batch, by default all, behind a progress bar: indices, pixels [B, H, W, C], seconds of each."""
    batches = batches_of(request) if batches is None else batches
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet) as progress:
        task = progress.add_task("images", total=sum(map(len, batches)))
        for indices in batches:
            begin = time.perf_counter()
            pixels = loaded.generate(**call_of(request, indices))
            synchronize(loaded.pipeline.device)
            yield indices, pixels, time.perf_counter() - begin
            progress.advance(task, len(indices))


def call_of(request: Generation, indices: range) -> dict[str, Any]:
    """Name what `LoadedPipeline.generate` takes for some of a request's images."""
    negative = request.negative_prompts
    return {
        "conditions": [request.conditions[index % len(request.conditions)] for index in indices],
        "seeds": [request.seed + index for index in indices],
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
        "negative_prompts": None if negative is None else [negative[index % len(negative)] for index in indices],
        "true_cfg_scale": request.true_cfg_scale,
        "max_sequence_length": request.max_sequence_length,
    }


def conditions_hash(conditions: list[Any]) -> str:
    """SHA-256 of the labels or prompts, in order."""
    return hashlib.sha256(json.dumps(conditions).encode()).hexdigest()


def generate_images(
    loaded: LoadedPipeline,
    request: Generation,
    parallel: ParallelPipeline | AlonePipeline,
    outputs: Outputs,
    finished: frozenset[int] = frozenset(),
    settings: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Write the images and ``statistics.json``.

    Collective: every rank calls it, data-parallel replicas generate contiguous parts of the images, and the job's
    first rank writes.

    Args:
        loaded: The pipeline.
        request: All images.
        parallel: The same pipeline, spread over the ranks.
        outputs: Where they go.
        finished: The images that are there already, the same on all ranks.
        settings: What else ``statistics.json`` is to say of the run.

    Returns:
        What ``statistics.json`` holds; ``None`` on the other ranks.

    Raises:
        LostPeer: Another rank is gone; the message says in which step.
    """
    mesh = parallel.mesh
    schedule = remaining_batches(request, mesh.degree("data"), finished)
    try:
        replicas = _generate(loaded, request, parallel, outputs, schedule)
    except RuntimeError as error:
        if mesh.mesh is None or not is_lost(error):
            raise
        done, steps = parallel.steps_done, request.num_inference_steps
        when = f"in step {done + 1} of {steps}" if done < steps else f"after step {steps}"
        which = "another rank that shares this image" if mesh.shares_image else "another rank"
        raise LostPeer(f"lost contact with {which}, {when}: {reason_of(error)}") from error
    if not mesh.is_first:
        return None
    document = {
        "model": loaded.name,
        "request": vars(request),
        "settings": settings or {},
        **replicas[0],
        "seconds": max(each["seconds"] for each in replicas),
        "parameter_bytes": [count for each in replicas for count in each["parameter_bytes"]],
        "generated": sum(len(batch) for own in schedule for batch in own),
        "images": outputs.names,
    }
    if len(replicas) > 1:
        document["replicas"] = replicas
    outputs.finish(document)
    return document


def _generate(
    loaded: LoadedPipeline,
    request: Generation,
    parallel: ParallelPipeline | AlonePipeline,
    outputs: Outputs,
    schedule: list[list[range]],
) -> list[dict[str, Any]]:
    """Make and write all images; every replica's statistics, on the first rank."""
    mesh = parallel.mesh
    own = schedule[mesh.rank("data")]
    batches = generate_batches(loaded, request, own, quiet=not mesh.is_first)
    seconds, pixels = 0.0, np.zeros(0, np.float32)
    for turn in range(max(map(len, schedule))):
        if turn < len(own):
            _, pixels, spent = next(batches)
            seconds += spent
        if not mesh.writes:
            continue
        due = [each[turn] if turn < len(each) else range(0) for each in schedule]
        for indices, part_of in zip(due, _collect(mesh, due, pixels), strict=False):
            if mesh.is_first:
                outputs.take(indices, part_of)
    next(batches, None)  # lets the progress bar end
    return _collect_objects(mesh, evidence(parallel) | {"seconds": seconds})


def _collect(mesh: ParallelMesh, due: list[range], pixels: np.ndarray) -> list[np.ndarray]:
    """The batches that all replicas have finished, on the first rank; an empty one where a replica was done before."""
    if len(due) == 1:
        return [pixels]
    size = max(map(len, due))
    own = torch.zeros((size, *pixels.shape[1:]))
    count = len(due[mesh.rank("data")])
    own[:count] = torch.from_numpy(pixels[:count])
    parts = [torch.empty_like(own) for _ in due] if mesh.is_first else None
    dist.gather(own, parts, dst=dist.get_global_rank(mesh.replicas, 0), group=mesh.replicas)
    return [each[: len(indices)].numpy() for each, indices in zip(parts or [], due, strict=False)]


def _collect_objects(mesh: ParallelMesh, value: dict[str, Any]) -> list[dict[str, Any]]:
    """A value of every replica, on the first rank."""
    if mesh.degree("data") == 1:
        return [value]
    values: list[Any] = [None] * mesh.degree("data")
    dist.all_gather_object(values, value, group=mesh.replicas)
    return values


def evidence(parallel: ParallelPipeline | AlonePipeline) -> dict[str, Any]:
    """What the ranks that share an image can say of what they did, in plain types. Collective."""
    summary = parallel.summary()
    told = parallel.gather((summary["plan_digest"], parallel.parameter_bytes()))
    result = {
        name: summary[name]
        for name in ("mesh", "hit_rate", "collectives_per_step", "bytes_per_step", "plan", "weights", "offsets")
        if name in summary
    }
    result |= {"plan_digests": [digest for digest, _ in told], "parameter_bytes": [count for _, count in told]}
    if "pipefusion" in summary:
        assert isinstance(parallel, ParallelPipeline)
        measured = parallel.efficiency()
        summary["pipefusion"] |= {"measured_efficiency": measured}
        result["pipefusion"] = summary["pipefusion"]
    return result | {"cache": summary}
