"""What a model's configuration says of its size, read before any weight is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import AutoencoderKL

from xfuser.config import ParallelConfig
from xfuser.model_executor.adapters import SPECS
from xfuser.model_executor.adapters.small import SIZE
from xfuser.model_executor.pipelines.loading import MODEL_TYPES, TOY, source_of, unloadable
from xfuser.model_executor.pipelines.shipped import shared_parts


@dataclass(frozen=True)
class ModelGeometry:
    """Attention heads, blocks, rows of the latents and image tokens of one image, and what its sides are multiples of.

    ``height`` and ``width`` are those that are drawn where none is named.
    """

    heads: int
    blocks: int
    latent_rows: int
    tokens: int
    multiple: int = 1
    height: int = 0
    width: int = 0

    def check(self, parallel: ParallelConfig) -> None:
        """Refuse degrees that do not fit the model (ValueError)."""
        parallel.check_model(self.heads, self.blocks)
        parallel.check_tokens(self.tokens)
        if parallel.use_parallel_vae and parallel.image_degree > self.latent_rows:
            raise ValueError(
                f"--use_parallel_vae: {parallel.image_degree} ranks share an image of {self.latent_rows} rows of "
                "latents; leave it out"
            )


def geometry_of(
    model_type: str, named: str | None = None, height: int | None = None, width: int | None = None
) -> ModelGeometry:
    """Read the geometry of what `load_pipeline` would load, for images of this size.

    Raises:
        ValueError: The model's configuration cannot be read.
    """
    spec = MODEL_TYPES[model_type]
    source = source_of(model_type, named)
    model = SPECS[spec.transformer_class]
    transformer: Mapping[str, Any]
    if source == TOY:
        assert spec.toy is not None
        toy = spec.toy()
        transformer, autoencoder = getattr(toy, model.components[0]).config, toy.vae.config
        size = {"height": SIZE, "width": SIZE} | spec.toy_arguments
    else:
        try:
            transformer, autoencoder = (_configuration(source, part) for part in (model.components[0], "vae"))
        except (OSError, ValueError, KeyError) as error:
            raise unloadable(source, spec, error) from error
        size = spec.call_arguments
        if transformer.get("_class_name") != spec.transformer_class:
            raise ValueError(
                f"{source!r} has a {transformer.get('_class_name')}; --model_type {model_type} wants a "
                f"{spec.transformer_class}"
            )
    levels = autoencoder.get("block_out_channels") or autoencoder["dim_mult"]
    shrink = autoencoder.get("scale_factor_spatial") or 2 ** (len(levels) - 1)
    side = transformer.get("sample_size") or 128
    rows = (height or size.get("height") or side * shrink) // shrink
    columns = (width or size.get("width") or side * shrink) // shrink
    if spec.conditioned_on == "label":
        rows = columns = side
    # A video's patches have a length, too; the first latent frame stands for one frame of it, each other one for four.
    length, *_, patch = [1, *np.atleast_1d(transformer.get("patch_size", 1)).tolist()][-3:]
    patch *= model.packs
    frames = (size.get("num_frames", 1) - 1) // (autoencoder.get("scale_factor_temporal") or 4) + 1
    return ModelGeometry(
        transformer.get("num_attention_heads") or 1,
        sum(transformer.get(name) or 0 for name in model.layer_counts) or 1,
        rows,
        (frames // length) * (rows // patch) * (columns // patch),
        shrink * patch,
        rows * shrink,
        columns * shrink,
    )


def _configuration(source: str, part: str) -> Mapping[str, Any]:
    """Read a part's configuration, which may lie in another model's folder."""
    shared = shared_parts(source).get(part)
    if shared is not None:
        return AutoencoderKL.load_config(shared)
    return AutoencoderKL.load_config(source, subfolder=part)  # any model's does
