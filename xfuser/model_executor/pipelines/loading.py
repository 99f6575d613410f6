"""From a model's type and name to a pipeline that is ready to generate, and how to ask it for images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from packaging import version

from xfuser.model_executor.pipelines.toy_flux import build_toy_flux
from xfuser.model_executor.pipelines.toy_parts import SIZE
from xfuser.model_executor.pipelines.toy_pixart import build_toy_pixart
from xfuser.model_executor.pipelines.toy_sd3 import build_toy_sd3

TOY = "toy"
# diffusers renamed the argument.
DTYPE = "dtype" if version.parse(diffusers.__version__) >= version.parse("0.42") else "torch_dtype"


def shipped_tiny_dit() -> Path:
    """The folder of the tiny-dit that comes with the package."""
    return Path(str(files("xfuser") / "assets" / "tiny-dit"))


@dataclass(frozen=True)
class ModelType:
    """One family of pipelines as the command lines know it.

    Attributes:
        transformer_class: The name of their transformer's class.
        pipeline_classes: The diffusers classes; where there are several, a model names its own in its model_index.json.
        default: What is loaded when no model is named; ``None`` where the toy is built instead.
        conditioned_on: ``"label"`` or ``"prompt"``.
        guidance_scale: The default.
        thresholds: The default rel_l1_thresh of each base method that has one.
        evaluated: Whether the shipped feature network can judge its images.
        toy: Builds a pipeline of this family with random weights.
        toy_arguments: What a call of the toy needs besides, where it differs from the pipeline's own defaults.
    """

    transformer_class: str
    pipeline_classes: tuple[type[DiffusionPipeline], ...]
    default: Callable[[], Path] | str | None
    conditioned_on: str
    guidance_scale: float
    thresholds: dict[str, float]
    evaluated: bool = False
    toy: Callable[[], DiffusionPipeline] | None = None
    toy_arguments: dict[str, Any] = field(default_factory=dict)


SHORT = {"max_sequence_length": 64}

MODEL_TYPES = {
    "tiny-dit": ModelType(
        "DiTTransformer2DModel",
        (DiTPipeline,),
        shipped_tiny_dit,
        "label",
        1.5,
        {"Fast": 0.016, "Tea": 0.06, "Fb": 0.05},
        evaluated=True,
    ),
    "dit": ModelType(
        "DiTTransformer2DModel",
        (DiTPipeline,),
        "facebook/DiT-XL-2-256",
        "label",
        1.5,
        {"Fast": 0.05, "Tea": 0.1, "Fb": 0.08},
    ),
    "flux": ModelType(
        "FluxTransformer2DModel",
        (FluxPipeline,),
        None,
        "prompt",
        3.5,
        {"Fast": 0.05, "Tea": 0.4, "Fb": 0.08},
        toy=build_toy_flux,
        toy_arguments=SHORT,
    ),
    # The thresholds of these two are those at which the toys skip about half of their block evaluations in 20 steps; no
    # real weights were at hand to choose them by.
    "pixart": ModelType(
        "PixArtTransformer2DModel",
        (PixArtAlphaPipeline, PixArtSigmaPipeline),
        None,
        "prompt",
        4.5,
        {"Fast": 0.05, "Tea": 0.05, "Fb": 0.017},
        toy=build_toy_pixart,
        # Binning knows no size as small as the toy's, and cleaning wants packages that are not required here.
        toy_arguments=SHORT | {"use_resolution_binning": False, "clean_caption": False},
    ),
    "sd3": ModelType(
        "SD3Transformer2DModel",
        (StableDiffusion3Pipeline,),
        None,
        "prompt",
        7.0,
        {"Fast": 0.05, "Tea": 0.04, "Fb": 0.07},
        toy=build_toy_sd3,
        toy_arguments=SHORT,
    ),
}


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline and what the command lines need to know about it."""

    pipeline: DiffusionPipeline
    model_type: str
    name: str
    dtype: torch.dtype

    @property
    def spec(self) -> ModelType:
        return MODEL_TYPES[self.model_type]

    def num_classes(self) -> int:
        """Number of classes that the model was trained on, as its label table says."""
        return len(set(self.pipeline.labels.values())) or self.pipeline.transformer.config.num_embeds_ada_norm

    def generate(
        self,
        conditions: list[Any],
        seeds: list[int],
        num_inference_steps: int,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float | None = None,
    ) -> np.ndarray:
        """Generate one image per condition (labels or prompts), image i from the noise of seeds[i].

        ``negative_prompt`` belongs to prompt models, ``true_cfg_scale`` to those that evaluate the two branches of
        guidance one after the other.

        Returns:
            Images, float32 [N, H, W, C] in [0, 1].
        """
        sizes = (height, width, negative_prompt, true_cfg_scale)
        arguments = self.arguments(conditions, seeds, num_inference_steps, guidance_scale, *sizes)
        return np.asarray(self.pipeline(**arguments).images, dtype=np.float32)

    def arguments(
        self,
        conditions: list[Any],
        seeds: list[int],
        num_inference_steps: int,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float | None = None,
    ) -> dict[str, Any]:
        """Make the pipeline's arguments for `generate`."""
        arguments: dict[str, Any] = {
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": num_inference_steps,
            "guidance_scale": self.spec.guidance_scale if guidance_scale is None else guidance_scale,
            "output_type": "np",
        }
        if self.spec.conditioned_on == "label":
            arguments["class_labels"] = conditions
        else:
            toy = self.name == f"{TOY}-{self.model_type}"
            size = SIZE if toy else None
            arguments |= {"prompt": conditions, "height": height or size, "width": width or size}
            if negative_prompt is not None:
                arguments["negative_prompt"] = [negative_prompt] * len(conditions)
            if true_cfg_scale is not None:
                arguments["true_cfg_scale"] = true_cfg_scale
            if toy:
                arguments |= self.spec.toy_arguments
        return arguments


def load_pipeline(
    model_type: str, model: str | None = None, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> LoadedPipeline:
    """Load a pipeline from a folder or a hub id (safetensors only), or build the toy one.

    Args:
        model_type: A key of `MODEL_TYPES`.
        model: Folder or hub id; ``None`` takes the type's default.
        device: Where to run; the CPU by default.
        dtype: Of the weights; by default float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ValueError: The type is unknown, or nothing can be loaded from there.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model type {model_type!r} is not known; choose one of {', '.join(MODEL_TYPES)}")
    spec = MODEL_TYPES[model_type]
    device = device or torch.device("cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    source = source_of(model_type, model)
    if source == TOY:
        assert spec.toy is not None
        return _ready(LoadedPipeline(spec.toy(), model_type, f"{TOY}-{model_type}", dtype), device)
    try:
        pipeline = _class_of(source, spec).from_pretrained(source, use_safetensors=True, **{DTYPE: dtype})
    except (OSError, ValueError, KeyError) as error:
        raise unloadable(source, spec, error) from error
    name = model_type if model is None and callable(spec.default) else source
    return _ready(LoadedPipeline(pipeline, model_type, name, dtype), device)


def source_of(model_type: str, model: str | None) -> str:
    """The folder or hub id that is loaded, or `TOY`.

    Raises:
        ValueError: A toy was asked for, and there is none.
    """
    spec = MODEL_TYPES[model_type]
    source = model or (str(spec.default()) if callable(spec.default) else spec.default or TOY)
    if source == TOY and spec.toy is None:
        raise ValueError(f"there is no toy model of type {model_type!r}; name a folder or a hub id")
    return source


def unloadable(source: str, spec: ModelType, error: Exception) -> ValueError:
    """What to raise where nothing can be loaded from there, in one line."""
    reason = str(error).strip().splitlines()[0]
    known = " or ".join(each.__name__ for each in spec.pipeline_classes)
    return ValueError(f"cannot load {source!r} as {known}: {reason}")


def _class_of(source: str, spec: ModelType) -> type[DiffusionPipeline]:
    if len(spec.pipeline_classes) == 1:
        return spec.pipeline_classes[0]
    named = DiffusionPipeline.load_config(source)["_class_name"]
    for each in spec.pipeline_classes:
        if each.__name__ == named:
            return each
    raise ValueError(f"it is a {named}")


def _ready(loaded: LoadedPipeline, device: torch.device) -> LoadedPipeline:
    loaded.pipeline.to(device)
    if loaded.pipeline.transformer.dtype != loaded.dtype:
        loaded.pipeline.to(loaded.dtype)
    loaded.pipeline.set_progress_bar_config(disable=True)
    return loaded
