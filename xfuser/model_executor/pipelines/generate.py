"""Generate images with a cached pipeline, batch by batch, losing nothing on a failure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xfuser.core.distributed.environment import synchronize
from xfuser.core.files import replacing, write_json
from xfuser.model_executor.cache import CacheEngine
from xfuser.model_executor.pipelines.loading import LoadedPipeline


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


def generate_batches(loaded: LoadedPipeline, request: Generation) -> Iterator[tuple[range, np.ndarray, float]]:
    """Generate batch by batch, behind a progress bar: indices, pixels [B, H, W, C] and seconds of each."""
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("images", total=request.num_images)
        for start in range(0, request.num_images, request.batch_size):
            indices = range(start, min(start + request.batch_size, request.num_images))
            begin = time.perf_counter()
            pixels = loaded.generate(
                [request.conditions[index % len(request.conditions)] for index in indices],
                [request.seed + index for index in indices],
                request.num_inference_steps,
                request.guidance_scale,
                request.height,
                request.width,
            )
            synchronize(loaded.pipeline.device)
            yield indices, pixels, time.perf_counter() - begin
            progress.update(task, completed=indices[-1] + 1)


def conditions_hash(conditions: list[Any]) -> str:
    """SHA-256 of the labels or prompts, in order."""
    return hashlib.sha256(json.dumps(conditions).encode()).hexdigest()


def generate_images(
    loaded: LoadedPipeline, request: Generation, engine: CacheEngine | None, folder: Path
) -> dict[str, Any]:
    """Write ``image_00000.png`` … and ``statistics.json`` into the folder.

    Returns:
        What ``statistics.json`` holds: the request, seconds, paths and the engine's summary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[str] = []
    seconds = 0.0
    for indices, pixels, spent in generate_batches(loaded, request):
        seconds += spent
        for index, image in zip(indices, pixels, strict=True):
            paths.append(save_image(image, folder / f"image_{index:05d}.png").name)
    document = {
        "model": loaded.name,
        "request": vars(request),
        "seconds": seconds,
        "images": paths,
        "cache": engine.summary() if engine else None,
    }
    write_json(folder / "statistics.json", document)
    return document


def save_image(pixels: np.ndarray, path: Path) -> Path:
    """Save float [H, W, C] in [0, 1] as a PNG, under a temporary name until it is whole."""
    shades = np.round(pixels * 255).astype(np.uint8)
    with replacing(path) as temporary:
        Image.fromarray(shades[..., 0] if shades.shape[-1] == 1 else shades).save(temporary, format="PNG")
    return path
