"""From a model's type and name to a pipeline that is ready to generate, and how to ask it for images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from packaging import version
from torch import nn

from xfuser.config.spelling import not_known
from xfuser.model_executor.adapters import denoisers_of
from xfuser.model_executor.adapters.small import SIZE
from xfuser.model_executor.pipelines.model_types import MODEL_TYPES, ModelType, shipped_tiny_dit
from xfuser.model_executor.pipelines.shipped import INDEX, own_model, shared_parts

__all__ = ["DTYPE", "MODEL_TYPES", "TOY", "LoadedPipeline", "ModelType", "load_pipeline", "shipped_tiny_dit"]

TOY = "toy"
# diffusers renamed the argument.
DTYPE = "dtype" if version.parse(diffusers.__version__) >= version.parse("0.42") else "torch_dtype"


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
        return len(set(self.pipeline.labels.values())) or self.denoiser.config.num_embeds_ada_norm

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's transformer or UNet; the first, where there are two."""
        return denoisers_of(self.pipeline)[0]

    def generate(
        self, conditions: list[Any], seeds: list[int], num_inference_steps: int, **sampling: Any
    ) -> np.ndarray:
        """Generate one image or video per condition, number i from the noise of seeds[i].

        Args:
            conditions: Labels, prompts or scene graphs; the last as JSON text, or as what that says.
            seeds: As many.
            num_inference_steps: Denoising steps.
            **sampling: The other arguments of `arguments`.

        Returns:
            Images, float32 [N, H, W, C] in [0, 1]; videos, [N, F, H, W, C].
        """
        arguments = self.arguments(conditions, seeds, num_inference_steps, **sampling)
        return np.asarray(getattr(self.pipeline(**arguments), self.spec.makes), dtype=np.float32)

    def arguments(
        self,
        conditions: list[Any],
        seeds: list[int],
        num_inference_steps: int,
        *,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompts: list[str] | None = None,
        true_cfg_scale: float | None = None,
        max_sequence_length: int | None = None,
    ) -> dict[str, Any]:
        """Make the pipeline's arguments for `generate`.

        Sizes, ``negative_prompts`` and ``max_sequence_length`` (text tokens) belong to prompt models,
        ``true_cfg_scale`` to those that evaluate the two branches of guidance one after the other.
        """
        arguments: dict[str, Any] = {
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": num_inference_steps,
            "guidance_scale": self.spec.guidance_scale if guidance_scale is None else guidance_scale,
            "output_type": "np",
        }
        if self.spec.conditioned_on == "label":
            arguments["class_labels"] = conditions
        elif self.spec.conditioned_on == "scene_graph":
            arguments["scene_graphs"] = conditions
        else:
            toy = self.name == f"{TOY}-{self.model_type}"
            own = {"height": SIZE, "width": SIZE} | self.spec.toy_arguments if toy else self.spec.call_arguments
            arguments |= {"prompt": conditions, "height": None, "width": None} | own
            named = {
                "height": height,
                "width": width,
                "negative_prompt": negative_prompts,
                "true_cfg_scale": true_cfg_scale,
                "max_sequence_length": max_sequence_length,
            }
            arguments |= {name: value for name, value in named.items() if value is not None}
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
        raise ValueError(f"model type {model_type!r} {not_known(model_type, MODEL_TYPES)}")
    spec = MODEL_TYPES[model_type]
    device = device or torch.device("cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    source = source_of(model_type, model)
    if source == TOY:
        assert spec.toy is not None
        return _ready(LoadedPipeline(spec.toy(), model_type, f"{TOY}-{model_type}", dtype), device)
    try:
        shared = load_shared(source, dtype)
        pipeline = _class_of(source, spec).from_pretrained(source, use_safetensors=True, **{DTYPE: dtype}, **shared)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise unloadable(source, spec, error) from error
    name = model_type if model is None and callable(spec.default) else source
    return _ready(LoadedPipeline(pipeline, model_type, name, dtype), device)


def source_of(model_type: str, model: str | None) -> str:
    """The folder or hub id that is loaded, or `TOY`.

    Raises:
        ValueError: A toy was asked for, and there is none; or there is no model of the type's own.
    """
    spec = MODEL_TYPES[model_type]
    source = model or str(own_model(model_type) or TOY)
    if source == TOY and spec.toy is None:
        raise ValueError(f"there is no toy model of type {model_type!r}; name a folder or a hub id")
    return source


def load_shared(source: str, dtype: torch.dtype) -> dict[str, Any]:
    """Load the parts that a model takes from the models beside it, by name.

    Raises:
        ValueError: One is not there, or the model's index says nothing of it.
    """
    parts = shared_parts(source)
    if not parts:
        return {}
    index = json.loads((Path(source) / INDEX).read_text(encoding="utf-8"))
    libraries = {"diffusers": diffusers, "transformers": transformers}
    loaded = {}
    for name, folder in parts.items():
        library, kind = index.get(name) or (None, None)
        if library not in libraries:
            raise ValueError(f"its {INDEX} names no class of diffusers or transformers for {name!r}")
        cls = getattr(libraries[library], kind)
        if issubclass(cls, nn.Module):
            loaded[name] = cls.from_pretrained(folder, use_safetensors=True).to(dtype)
        else:
            loaded[name] = cls.from_pretrained(folder)
    return loaded


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
    if loaded.denoiser.dtype != loaded.dtype:
        loaded.pipeline.to(loaded.dtype)
    loaded.pipeline.set_progress_bar_config(disable=True)
    return loaded
