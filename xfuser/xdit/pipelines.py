"""xDiT's names for pipelines: thin wrappers that spread a diffusers pipeline with `parallelize`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from xfuser.config.cache import FIRST
from xfuser.core.files import replacing
from xfuser.model_executor.adapters import FAMILIES, Family
from xfuser.model_executor.parallel import ParallelPipeline, parallelize
from xfuser.model_executor.parallel.batch import part_of_batch
from xfuser.model_executor.pipelines.generate import save_image
from xfuser.model_executor.pipelines.loading import DTYPE
from xfuser.xdit.configs import EngineConfig, InputConfig
from xfuser.xdit.parallel_state import current_mesh, is_dp_last_group
from xfuser.xdit.settings import cache_settings_of, check_loading, check_runtime
from xfuser.xdit.table import WRAPPED

if TYPE_CHECKING:
    from typing_extensions import Self

_OWN = ("pipeline", "engine_config")
_ATTACHED = ("transformer", "scheduler", "vae")
_OFFLOADING = ("enable_group_offload", "enable_model_cpu_offload", "enable_sequential_cpu_offload")


class xFuserPipeline:  # noqa: N801 (xDiT's way of naming)
    """A diffusers pipeline under the name that xDiT's scripts know it by; whatever is not defined here is its own.

    Args:
        pipeline: The diffusers pipeline.
        engine_config: What `xFuserArgs.create_config` returned.
        cache_args: The script's cache settings; those of the command line go before them.

    Raises:
        TypeError: The pipeline is of another class, or a cache setting is not known.
        ValueError: A setting is out of its range or not supported.
    """

    diffusers_class: ClassVar[type[DiffusionPipeline]]
    thresholds: ClassVar[Mapping[str, float]]
    least_steps: ClassVar[int] = 1  # to warm up with

    def __init__(self, pipeline: Any, engine_config: EngineConfig, cache_args: Mapping[str, Any] | None = None) -> None:
        if not isinstance(pipeline, self.diffusers_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self.diffusers_class.__name__}, not a {type(pipeline).__name__}"
            )
        self._settings = self._checked(engine_config, cache_args)
        self._parallel: ParallelPipeline | None = None
        self.pipeline, self.engine_config = pipeline, engine_config
        if engine_config.runtime_config.enable_tiling:
            pipeline.vae.enable_tiling()
        if engine_config.runtime_config.enable_slicing:
            pipeline.vae.enable_slicing()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        engine_config: EngineConfig,
        cache_args: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Self:
        """Load the diffusers pipeline from a folder or a hub id (safetensors only).

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            engine_config: What `xFuserArgs.create_config` returned.
            cache_args: The script's cache settings.
            **keywords: What diffusers' own ``from_pretrained`` takes; ``torch_dtype`` and ``dtype`` are the same.

        Raises:
            TypeError: A cache setting is not known.
            ValueError: A setting is out of its range or not supported, or nothing can be loaded from there.
        """
        check_loading(keywords)
        cls._checked(engine_config, cache_args)
        keywords.pop("trust_remote_code", None)  # these pipelines come with no code, and none is run
        keywords |= {"use_safetensors": True}
        dtypes = [keywords.pop(name, None) for name in ("torch_dtype", "dtype")]
        dtype = next((each for each in (*dtypes, engine_config.runtime_config.dtype) if each is not None), None)
        if dtype is not None:
            keywords[DTYPE] = dtype
        if engine_config.model_config.download_dir is not None:
            keywords.setdefault("cache_dir", engine_config.model_config.download_dir)
        try:
            pipeline = cls.diffusers_class.from_pretrained(pretrained_model_name_or_path, **keywords)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            source = str(pretrained_model_name_or_path)
            raise ValueError(f"cannot load {source!r} as {cls.diffusers_class.__name__}: {reason}") from error
        return cls(pipeline, engine_config, cache_args)

    @property
    def parallel(self) -> ParallelPipeline:
        """The pipeline as it is spread over the ranks, for ``summary()`` and the like. Attached on first use.

        Raises:
            ValueError: The degrees do not fit the model or the processes, or the pipeline is on another device.
        """
        if self._parallel is None:
            mesh, config = current_mesh(), self.engine_config.parallel_config
            check_runtime(self.engine_config)
            if mesh.config != config:
                raise ValueError(
                    f"this process is placed among {mesh.config.shape} (data, cfg, pipefusion, ring, ulysses), the "
                    f"engine_config asks for {config.shape}, or for other settings; use the last create_config()'s"
                )
            compiled = self.engine_config.runtime_config.use_torch_compile
            self._parallel = parallelize(self.pipeline, mesh, use_torch_compile=compiled, **self._settings)
        return self._parallel

    def to(self, *args: Any, **keywords: Any) -> Self:
        """Move the pipeline, or change its dtype."""
        self.pipeline.to(*args, **keywords)
        return self

    def prepare_run(self, input_config: InputConfig, steps: int = 3, sync_steps: int = 1) -> None:
        """Generate once for nothing, so that the call that counts finds everything warm; nothing is remembered of it.

        Args:
            input_config: The sizes.
            steps: Denoising steps; at least two for PixArt alpha. With a calibration file they are the input's, which
                the file belongs to.
            sync_steps: PipeFusion: how many of them are synchronous.
        """
        calibration = self._settings.get("calibration")
        if calibration not in (None, FIRST):
            steps = input_config.num_inference_steps
        steps = max(steps, self.least_steps)
        batch = input_config.batch_size or 1
        keywords = {
            "prompt": [""] * batch if batch > 1 else "",
            "height": input_config.height,
            "width": input_config.width,
            "use_resolution_binning": input_config.use_resolution_binning,
            "num_inference_steps": steps,
            "guidance_scale": input_config.guidance_scale,
            "max_sequence_length": input_config.max_sequence_length,
            "output_type": input_config.output_type,
            "generator": torch.Generator().manual_seed(input_config.seed),
        }
        taken = inspect.signature(type(self.pipeline).__call__).parameters
        partition = self.parallel.partition
        warmup_steps, partition.warmup_steps = partition.warmup_steps, sync_steps
        try:
            self(**{name: value for name, value in keywords.items() if name in taken})
        finally:
            partition.warmup_steps = warmup_steps
            self.parallel.reset()
        if calibration == FIRST:
            # What it has learned would survive a reset. It is for one process an image, so that no block is gone.
            self.parallel.remove()
            self._parallel = None

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Generate this data-parallel group's part of the prompts; arguments and result are the diffusers pipeline's.

        Raises:
            ValueError: The degrees do not fit the model or the image.
        """
        parallel = self.parallel
        names = [name for name in inspect.signature(type(self.pipeline).__call__).parameters if name != "self"]
        arguments = dict(zip(names, args, strict=False)) | keywords
        part = part_of_batch(arguments, parallel.mesh.rank("data"), parallel.mesh.degree("data"))
        if part is not None:
            return parallel(**part)
        return ImagePipelineOutput(images=[]) if arguments.get("return_dict", True) else ([],)

    def is_dp_last_group(self) -> bool:
        """Whether this process is the one, of those that share an image, that saves it in xDiT's scripts."""
        return is_dp_last_group()

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name.startswith("__"):
            raise AttributeError(name)
        if name in _OFFLOADING:
            raise AttributeError(
                f"{name}() is not supported: weights stay on the device; use --pipefusion_parallel_degree to hold "
                "fewer of them"
            )
        return getattr(self.pipeline, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if name in _ATTACHED and self._parallel is not None:
            raise ValueError(f"{name}: the pipeline is spread over its ranks already; set it before the first call")
        setattr(self.pipeline, name, value)

    @classmethod
    def _checked(cls, engine_config: EngineConfig, cache_args: Mapping[str, Any] | None) -> dict[str, Any]:
        check_runtime(engine_config)
        return cache_settings_of(cache_args, engine_config, cls.thresholds)


# diffusers' PixArt alpha takes a single step for that of a distilled model.
_LEAST_STEPS = {"PixArtAlphaPipeline": 2}


def _wrapper(family: Family, name: str) -> type[xFuserPipeline]:
    """Make the class that stands for one of a family's diffusers pipelines."""
    own = {
        "__doc__": f"{family.title}.",
        "__module__": __name__,
        "diffusers_class": getattr(diffusers, name),
        "thresholds": family.spec.thresholds,
        "least_steps": _LEAST_STEPS.get(name, 1),
    }
    return type(f"xFuser{name}", (xFuserPipeline,), own)


WRAPPERS: dict[str, type[xFuserPipeline]] = {
    f"xFuser{name}": _wrapper(family, name)
    for family in FAMILIES
    for name in dict.fromkeys(small.pipeline for small in family.small.values())
    if f"xFuser{name}" in WRAPPED
}
globals().update(WRAPPERS)


class xDiTParallel:  # noqa: N801
    """Spreads a diffusers pipeline that the script has loaded itself, and warms it up.

    Args:
        pipe: The diffusers pipeline, on this process's device.
        engine_config: What `xFuserArgs.create_config` returned first.
        input_config: What it returned second.

    Raises:
        TypeError: The pipeline is none of those that are supported.
    """

    def __init__(self, pipe: Any, engine_config: EngineConfig, input_config: InputConfig) -> None:
        wrapper = next((each for each in WRAPPERS.values() if isinstance(pipe, each.diffusers_class)), None)
        if wrapper is None:
            known = ", ".join(each.diffusers_class.__name__ for each in WRAPPERS.values())
            raise TypeError(f"xDiTParallel does not take a {type(pipe).__name__}; give it one of {known}")
        self.pipe = wrapper(pipe, engine_config)
        self.result: Any = None
        self.pipe.prepare_run(input_config)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Generate; arguments and result are the diffusers pipeline's."""
        self.result = self.pipe(*args, **keywords)
        return self.result

    def save(self, directory: str | Path, prefix: str) -> list[Path]:
        """Write the last call's images as PNG, by one rank of each data-parallel group.

        Returns:
            The files of this rank, whose names tell the group and the place of an image in it.

        Raises:
            ValueError: Nothing was generated yet, or nothing that a PNG can hold.
        """
        if self.result is None:
            raise ValueError("nothing was generated yet; call the pipeline before save()")
        images = self.result[0]
        if isinstance(images, torch.Tensor):
            raise ValueError("tensors cannot be saved as PNG; use --output_type pil or np")
        if not self.pipe.is_dp_last_group():
            return []
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        mesh = self.pipe.parallel.mesh
        data, cfg, stages, ring, ulysses = mesh.config.shape
        degrees = f"dp{data}_cfg{cfg}_ulysses{ulysses}_ring{ring}_pp{stages}_patch{mesh.config.patches}"
        paths = []
        for index, image in enumerate(images):
            paths.append(folder / f"{prefix}_result_{degrees}_dprank{mesh.rank('data')}_image{index}.png")
            _save(image, paths[-1])
        return paths


def _save(image: Image.Image | np.ndarray, path: Path) -> None:
    if isinstance(image, np.ndarray):
        save_image(image, path)
        return
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
