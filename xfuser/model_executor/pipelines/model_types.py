"""The families of pipelines that the command lines know. Needs neither torch nor diffusers until one is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xfuser.config import thresholds

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_MODEL_TYPE = "tiny-dit"


def shipped_tiny_dit() -> Path:
    """The folder of the tiny-dit that comes with the package."""
    return Path(str(files("xfuser") / "assets" / "tiny-dit"))


def shipped_tiny_flux() -> Path:
    """The folder of the tiny-flux that comes with the package, where it does."""
    return Path(str(files("xfuser") / "assets" / "tiny-flux"))


def _toy(family: str) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        module = importlib.import_module(f"xfuser.model_executor.pipelines.toy_{family}")
        return getattr(module, f"build_toy_{family}")()

    return build


@dataclass(frozen=True)
class ModelType:
    """One family of pipelines as the command lines know it.

    Attributes:
        transformer_class: The name of their transformer's class.
        pipelines: The names of the diffusers classes; where there are several, a model names its own in its
            model_index.json.
        default: What is loaded when no model is named; ``None`` where the toy is built instead.
        conditioned_on: ``"label"`` or ``"prompt"``.
        guidance_scale: The default.
        thresholds: The default rel_l1_thresh of each base method that has one.
        evaluated: Whether the shipped feature network can judge its images.
        toy: Builds a pipeline of this family with random weights.
        toy_arguments: What a call of the toy needs besides, where it differs from the pipeline's own defaults.
        call_arguments: The same for any other model of the type.
        configuration: What tells its models from others of the same pipeline, in their transformer's configuration.
    """

    transformer_class: str
    pipelines: tuple[str, ...]
    default: Callable[[], Path] | str | None
    conditioned_on: str
    guidance_scale: float
    thresholds: Mapping[str, float]
    evaluated: bool = False
    toy: Callable[[], DiffusionPipeline] | None = None
    toy_arguments: dict[str, Any] = field(default_factory=dict)
    call_arguments: dict[str, Any] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pipeline_classes(self) -> tuple[type[DiffusionPipeline], ...]:
        """The diffusers classes themselves."""
        diffusers = importlib.import_module("diffusers")
        return tuple(getattr(diffusers, name) for name in self.pipelines)


SHORT = {"max_sequence_length": 64}

MODEL_TYPES = {
    "tiny-dit": ModelType(
        "DiTTransformer2DModel",
        ("DiTPipeline",),
        shipped_tiny_dit,
        "label",
        1.5,
        thresholds.TINY_DIT,
        evaluated=True,
        configuration=thresholds.TINY_DIT_CONFIGURATION,
    ),
    "dit": ModelType(
        "DiTTransformer2DModel",
        ("DiTPipeline",),
        "facebook/DiT-XL-2-256",
        "label",
        1.5,
        thresholds.DIT,
    ),
    "flux": ModelType(
        "FluxTransformer2DModel",
        ("FluxPipeline",),
        None,
        "prompt",
        3.5,
        thresholds.FLUX,
        toy=_toy("flux"),
        toy_arguments=SHORT,
    ),
    "tiny-flux": ModelType(
        "FluxTransformer2DModel",
        ("FluxPipeline",),
        shipped_tiny_flux,
        "prompt",
        2.0,
        thresholds.FLUX,
        toy=_toy("flux"),
        toy_arguments=SHORT,
        # FluxPipeline would draw 512 x 512 pixels with 512 text tokens; this model was trained on these.
        call_arguments={"height": 64, "width": 64, "max_sequence_length": 16},
        configuration=thresholds.TINY_FLUX_CONFIGURATION,
    ),
    "pixart": ModelType(
        "PixArtTransformer2DModel",
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        None,
        "prompt",
        4.5,
        thresholds.PIXART,
        toy=_toy("pixart"),
        # Binning knows no size as small as the toy's, and cleaning wants packages that are not required here.
        toy_arguments=SHORT | {"use_resolution_binning": False, "clean_caption": False},
    ),
    "sd3": ModelType(
        "SD3Transformer2DModel",
        ("StableDiffusion3Pipeline",),
        None,
        "prompt",
        7.0,
        thresholds.SD3,
        toy=_toy("sd3"),
        toy_arguments=SHORT,
    ),
}

# Names under which xDiT's own command knows models of these families.
SHORT_NAMES = {
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
    "FLUX.1-schnell": "black-forest-labs/FLUX.1-schnell",
    "SD3.5": "stabilityai/stable-diffusion-3.5-large",
    "stable-diffusion-3.5-large": "stabilityai/stable-diffusion-3.5-large",
}
