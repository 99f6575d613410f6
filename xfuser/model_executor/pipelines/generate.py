"""Generate images with a cached pipeline, batch by batch, losing nothing on a failure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xfuser.core.distributed.environment import synchronize
from xfuser.core.distributed.failing import LostPeer, is_lost, reason_of
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.core.files import replacing, write_json
from xfuser.core.shards import part
from xfuser.model_executor.parallel import ParallelPipeline
from xfuser.model_executor.pipelines.loading import LoadedPipeline

STATISTICS = "statistics.json"
RAW = "images.npy"


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
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None


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
            pixels = loaded.generate(*call_of(request, indices))
            synchronize(loaded.pipeline.device)
            yield indices, pixels, time.perf_counter() - begin
            progress.advance(task, len(indices))


def call_of(request: Generation, indices: range) -> tuple[Any, ...]:
    """List what `LoadedPipeline.generate` takes for some of a request's images."""
    return (
        [request.conditions[index % len(request.conditions)] for index in indices],
        [request.seed + index for index in indices],
        request.num_inference_steps,
        request.guidance_scale,
        request.height,
        request.width,
        request.negative_prompt,
        request.true_cfg_scale,
    )


def conditions_hash(conditions: list[Any]) -> str:
    """SHA-256 of the labels or prompts, in order."""
    return hashlib.sha256(json.dumps(conditions).encode()).hexdigest()


def generate_images(
    loaded: LoadedPipeline,
    request: Generation,
    parallel: ParallelPipeline,
    folder: Path,
    save_raw: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Write ``image_00000.png`` … and ``statistics.json`` into the folder, with ``save_raw`` also ``images.npy``.

    Collective: every rank calls it, data-parallel replicas generate contiguous parts of the images, and the job's
    first rank writes.

    Args:
        loaded: The pipeline.
        request: All images.
        parallel: The same pipeline, spread over the ranks.
        folder: Where to write.
        save_raw: Whether to write the pixels as float32 [N, H, W, C], 0 to 1, too.
        settings: What else ``statistics.json`` is to say of the run.

    Returns:
        What ``statistics.json`` holds; ``None`` on the other ranks.

    Raises:
        LostPeer: Another rank is gone; the message says in which step.
    """
    mesh = parallel.mesh
    try:
        images, replicas = _generate(loaded, request, parallel, folder if mesh.is_first else None, save_raw)
    except RuntimeError as error:
        if mesh.mesh is None or not is_lost(error):
            raise
        done, steps = parallel.steps_done, request.num_inference_steps
        when = f"in step {done + 1} of {steps}" if done < steps else f"after step {steps}"
        which = "another rank that shares this image" if mesh.shares_image else "another rank"
        raise LostPeer(f"lost contact with {which}, {when}: {reason_of(error)}") from error
    if not mesh.is_first:
        return None
    if save_raw:
        with replacing(folder / RAW) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate([images.kept[index] for index in sorted(images.kept)]))
    document = {
        "model": loaded.name,
        "request": vars(request),
        "settings": settings or {},
        **replicas[0],
        "seconds": max(each["seconds"] for each in replicas),
        "parameter_bytes": [count for each in replicas for count in each["parameter_bytes"]],
        "images": images.names,
    }
    if len(replicas) > 1:
        document["replicas"] = replicas
    write_json(folder / STATISTICS, document)
    return document


class _Images:
    """Images that are finished: written at once, their pixels kept where they are wanted raw."""

    def __init__(self, folder: Path, save_raw: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._save_raw = folder, save_raw
        self._paths: dict[int, str] = {}
        self.kept: dict[int, np.ndarray] = {}

    @property
    def names(self) -> list[str]:
        return [self._paths[index] for index in sorted(self._paths)]

    def take(self, indices: range, pixels: np.ndarray) -> None:
        if len(indices) and self._save_raw:
            self.kept[indices.start] = pixels
        for index, image in zip(indices, pixels, strict=True):
            self._paths[index] = save_image(image, self._folder / f"image_{index:05d}.png").name


def _generate(
    loaded: LoadedPipeline, request: Generation, parallel: ParallelPipeline, folder: Path | None, save_raw: bool
) -> tuple[Any, list[dict[str, Any]]]:
    """All images and every replica's statistics, on the first rank."""
    mesh = parallel.mesh
    count, own = mesh.degree("data"), mesh.rank("data")
    schedule = [batches_of(request, count, index) for index in range(count)]
    images = None if folder is None else _Images(folder, save_raw)
    batches = generate_batches(loaded, request, schedule[own], quiet=folder is None)
    seconds, pixels = 0.0, np.zeros(0, np.float32)
    for turn in range(max(map(len, schedule))):
        if turn < len(schedule[own]):
            _, pixels, spent = next(batches)
            seconds += spent
        if not mesh.writes:
            continue
        due = [each[turn] if turn < len(each) else range(0) for each in schedule]
        for indices, part_of in zip(due, _collect(mesh, due, pixels), strict=False):
            if images is not None:
                images.take(indices, part_of)
    next(batches, None)  # lets the progress bar end
    return images, _collect_objects(mesh, evidence(parallel) | {"seconds": seconds})


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


def evidence(parallel: ParallelPipeline) -> dict[str, Any]:
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
        measured = parallel.efficiency()
        summary["pipefusion"] |= {"measured_efficiency": measured}
        result["pipefusion"] = summary["pipefusion"]
    return result | {"cache": summary}


def save_image(pixels: np.ndarray, path: Path) -> Path:
    """Save float [H, W, C] in [0, 1] as a PNG, under a temporary name until it is whole."""
    shades = np.round(pixels * 255).astype(np.uint8)
    with replacing(path) as temporary:
        Image.fromarray(shades[..., 0] if shades.shape[-1] == 1 else shades).save(temporary, format="PNG")
    return path
