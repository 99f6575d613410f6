"""A family of models: what the engine, the command lines and the tests need of it, in one file. Needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.spec import ModelSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def shipped(model: str) -> Path:
    """The folder of a model that comes with the package, where it does."""
    return Path(str(files("xfuser") / "assets" / model))


@dataclass(frozen=True)
class ModelType:
    """Models as the command lines know them.

    Attributes:
        transformer_class: The name of their transformer's class.
        pipelines: The names of the diffusers classes, or of those in ``module``; where there are several, a model names
            its own in its model_index.json.
        default: What is loaded when no model is named; ``None`` where the toy is built instead.
        conditioned_on: ``"label"``, ``"prompt"`` or ``"scene_graph"``.
        guidance_scale: The default.
        thresholds: The default rel_l1_thresh of each base method that has one.
        evaluated: Whether the shipped feature network can judge its images.
        toy: Builds a pipeline of this family with random weights.
        toy_arguments: What a call of the toy needs besides, where it differs from the pipeline's own defaults.
        call_arguments: The same for any other model of the type.
        configuration: What tells its models from others of the same pipeline, in their transformer's configuration.
        num_inference_steps: The default.
        reads_length: Whether its pipeline takes ``max_sequence_length``.
        makes: ``"images"`` or ``"frames"``, as its pipeline's output names them.
        preset: Whether it is a published model, of a type that has others too.
        unpublished: Why there is nothing to load where no model is named, if that is so.
        true_cfg: Whether guidance by a negative prompt has a scale of its own, ``true_cfg_scale``.
        module: Where the pipeline classes are.
        made_by: What trains it, where that is not the script of its own name.
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
    num_inference_steps: int = 50
    reads_length: bool = True
    true_cfg: bool = False
    makes: str = "images"
    preset: bool = False
    unpublished: str = ""
    module: str = "diffusers"
    made_by: str = ""

    @property
    def pipeline_classes(self) -> tuple[type[DiffusionPipeline], ...]:
        """The classes themselves."""
        module = importlib.import_module(self.module)
        return tuple(getattr(module, name) for name in self.pipelines)


@dataclass(frozen=True)
class SmallPipeline:
    """A pipeline of toy size with random weights, every part of it the real one, and how tests call it.

    Attributes:
        pipeline: Name of the diffusers class.
        build: Builds it, without touching the caller's random numbers.
        call: Arguments that ask for so many images, but for steps, generator and output type.
        guided: What is added to them for guidance of so many images; without it there is one branch.
        makes: ``"images"`` or ``"frames"``.
    """

    pipeline: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[[int], dict[str, Any]]
    guided: Callable[[int], dict[str, Any]]
    makes: str = "images"


@dataclass(frozen=True)
class Family:
    """All there is to know of one family.

    Attributes:
        title: Its name for people.
        spec: How it is cut into blocks.
        small: Its pipelines at toy size, by name.
        types: Its models on the command lines, by name.
    """

    title: str
    spec: ModelSpec
    small: Mapping[str, SmallPipeline]
    types: Mapping[str, ModelType] = field(default_factory=dict)


def foxes(count: int) -> dict[str, Any]:
    """Ask a toy for so many images of 64 x 64 pixels, with a short text each."""
    prompts = [f"fox number {index}" for index in range(count)]
    return {"prompt": prompts, "height": 64, "width": 64, "max_sequence_length": 16}
