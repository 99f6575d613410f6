"""One process of a worker group: it holds the pipeline, spread over the group's ranks, and generates batches."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xfuser.config.cache import FIRST
from xfuser.config.parallel import ParallelConfig
from xfuser.config.trajectory import AUTO
from xfuser.core.distributed.environment import (
    Meeting,
    choose_device,
    join_processes,
    memory_peak,
    numbered,
    synchronize,
)
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.model_executor.cache.apply import on_trajectory
from xfuser.model_executor.parallel import parallelize
from xfuser.model_executor.pipelines.loading import load_pipeline

CALIBRATION = "given.safetensors"


@dataclass(frozen=True)
class EngineSettings:
    """What every process of every group has to know to load the same engine.

    Args:
        model_type: A key of `MODEL_TYPES`.
        model: Folder or hub id, the same on every machine; ``None`` is the type's own.
        parallel: The degrees of one group.
        cache: What `parallelize` takes: ``use_cache`` and its settings, or a goal of the trajectory.
        calibration: The files of a calibration that was named, by suffix; they take the place of ``cache``'s path.
        device: As for ``--device``.
        threads: CPU threads of a process; by default torch's own choice.
        use_torch_compile: Compile the blocks.
        enable_tiling: Decode large images tile by tile.
        enable_slicing: Decode a batch image by image.
        timeout: Seconds after which a rank that does not answer is taken for lost.
    """

    model_type: str
    model: str | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, bytes] = field(default_factory=dict)
    device: str = "auto"
    threads: int | None = None
    use_torch_compile: bool = False
    enable_tiling: bool = False
    enable_slicing: bool = False
    timeout: float = 600

    @property
    def learns(self) -> bool:
        """Whether a calibration of the trajectory has to be learned, since no file of one was named."""
        others = {name: value for name, value in self.cache.items() if name != "use_cache"}
        return on_trajectory(self.cache.get("use_cache"), others) and others.get("calibration", AUTO) in (AUTO, FIRST)


class Rank:
    """The pipeline on one process of a group, from loading to pixels. Collective where the group has several.

    Args:
        settings: The same on every rank.
        place: This process's number in its group.
        url: Where the ranks meet, where there are several.

    Raises:
        ValueError: The model cannot be loaded, or the settings do not fit it.
    """

    def __init__(self, settings: EngineSettings, place: int = 0, url: str | None = None) -> None:
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="xfuser-calibration-")
        self._installed: set[str] = set()
        self._use_threads()
        parallel = settings.parallel
        device = numbered(choose_device(settings.device), 0)  # Ray shows a process its own accelerator only
        if parallel.world_size > 1:
            assert url is not None
            join_processes(device, settings.timeout, Meeting(url, place, parallel.world_size))
        self.loaded = load_pipeline(settings.model_type, settings.model, device)
        if settings.enable_tiling:
            self.loaded.pipeline.vae.enable_tiling()
        if settings.enable_slicing:
            self.loaded.pipeline.vae.enable_slicing()
        mesh = ParallelMesh(parallel, device)
        self.parallel = parallelize(
            self.loaded.pipeline, mesh, use_torch_compile=settings.use_torch_compile, **self._cache()
        )

    def generate(self, requests: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, dict[str, Any]]:
        """Generate one batch, as if it were the first: what earlier ones have left in a cache is forgotten.

        Args:
            requests: Those of one kind; see `Request.call`.

        Returns:
            Pixels, float32 [N, H, W, C] in [0, 1], and what the cache did.

        Raises:
            ValueError: The pipeline refuses the requests, or made something that is no image.
            RuntimeError: The calibration of this kind is not the job's.
        """
        self._use_threads()
        self.parallel.reset()
        pixels = self._run(requests)
        summary = self.parallel.summary()
        if self._settings.learns and summary.get("learned_generations"):
            raise RuntimeError(
                "this group would learn a calibration of its own, since the job's does not fit it; are the model's "
                "weights the same on all machines?"
            )
        if not np.isfinite(pixels).all():
            raise ValueError("the pipeline made an image that is not finite; try another dtype, seed or guidance_scale")
        steps = requests[0]["num_inference_steps"]
        share = 1.0 - float(summary.get("hit_rate") or 0.0)
        evaluated = summary.get("evaluated_steps")
        return pixels, {
            "evaluated_share": share,
            "evaluated_steps": evaluated if evaluated is not None else round(share * steps, 2),
            "plan_digest": summary.get("plan_digest"),
            "memory_peak": memory_peak(self.loaded.pipeline.device),
        }

    def learn(self, requests: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """Learn the calibration of one kind; the images are thrown away.

        Returns:
            Files by name, to be given to `install`; on the group's first rank, and none where nothing can be learned.

        Raises:
            ValueError: The goal cannot be reached; the line says what can.
        """
        self._use_threads()
        folder = Path(self._folder.name)
        before = set(folder.glob("*.safetensors"))
        self._run(requests)
        made = set(folder.glob("*.safetensors")) - before
        if not made and not self.parallel.summary().get("calibrated"):
            self._run(requests)  # a goal that cannot be reached is refused the second time
        self._installed |= {path.name for path in made}
        return {path.name: path.read_bytes() for path in sorted(made)}

    def install(self, files: Mapping[str, bytes]) -> None:
        """Take calibrations that another group has learned."""
        for name, content in files.items():
            if name not in self._installed:
                (Path(self._folder.name) / name).write_bytes(content)
                self._installed.add(name)

    def _run(self, requests: Sequence[Mapping[str, Any]]) -> np.ndarray:
        first, pipeline = requests[0], self.loaded.pipeline
        negative = [each["negative_prompt"] for each in requests] if first.get("negative_prompt") is not None else None
        arguments = self.loaded.arguments(
            [each["condition"] for each in requests],
            [each["seed"] for each in requests],
            first["num_inference_steps"],
            guidance_scale=first.get("guidance_scale"),
            height=first.get("height"),
            width=first.get("width"),
            negative_prompts=negative,
            true_cfg_scale=first.get("true_cfg_scale"),
            max_sequence_length=first.get("max_sequence_length"),
        )
        result = pipeline(**arguments, **first.get("others", {}))
        pixels = np.asarray(result.images, dtype=np.float32)
        synchronize(pipeline.device)
        return pixels

    def _cache(self) -> dict[str, Any]:
        """The cache's settings, with files and folders of this process."""
        settings = self._settings
        cache = dict(settings.cache)
        folder = Path(self._folder.name)
        if settings.learns:
            return cache | {"calibration": AUTO, "store": folder}
        if settings.calibration:
            given = folder / CALIBRATION
            for suffix, content in settings.calibration.items():
                given.with_suffix(suffix).write_bytes(content)
            return cache | {"calibration": str(given)}
        return cache

    def _use_threads(self) -> None:
        # Ray calls an actor's methods in threads, and each thread has its own number.
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
