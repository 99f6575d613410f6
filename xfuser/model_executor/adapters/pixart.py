"""PixArt alpha and Sigma (arXiv 2310.00426, 2403.04692): one stream that looks at the text through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.family import Family, ModelType, SmallPipeline, foxes, shipped
from xfuser.model_executor.adapters.spec import BlockGroup, ModelSpec

if TYPE_CHECKING:
    import torch
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
    from torch import nn

# At these the toy skips about half of its block evaluations in 20 steps with Tea and Fb; no real weights were at hand.
THRESHOLDS = {"Fast": 0.05, "Tea": 0.05, "Fb": 0.017}
# What tells tiny-pixart from others, and what its training builds (scripts/train_tiny_pixart.py).
TINY = {
    "num_layers": 10,
    "num_attention_heads": 4,
    "attention_head_dim": 28,
    "cross_attention_dim": 112,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 16,
    "patch_size": 2,
}
HEADS, HEAD_CHANNELS = 4, 12  # of the toy: their product must be divisible by 3, for alpha's embedding of the size


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    # The timestep comes embedded once for all blocks; a table of each block's own tells them apart. The first two of
    # its six rows belong to the first norm.
    hidden_states = arguments["hidden_states"]
    rows = block.scale_shift_table + arguments["timestep"].reshape(len(hidden_states), 6, -1)
    return block.norm1(hidden_states) * (1 + rows[:, 1:2]) + rows[:, 0:1]


def build_small(sigma: bool = False, seed: int = 0) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """Eight blocks of 4 heads, 12 channels each, a 64-pixel image of 64 tokens.

    Alpha is told the image's size and aspect ratio besides, as its 1024-pixel model is, which diffusers knows by its
    sample size of 128.
    """
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    from xfuser.model_executor.adapters import small

    with small.seeded(seed):
        transformer = PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_CHANNELS,
            cross_attention_dim=HEADS * HEAD_CHANNELS,
            in_channels=4,
            out_channels=8,
            num_layers=8,
            sample_size=small.SIZE // 4 if sigma else 128,
            patch_size=2,
            caption_channels=small.HIDDEN,
        )
        small.smooth_in_time(transformer.adaln_single.emb.timestep_embedder)
        return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
            transformer=transformer.eval(),
            # Taken for a noise prediction, as PixArt's is, random outputs would blow the first step up a hundredfold.
            scheduler=DPMSolverMultistepScheduler(prediction_type="v_prediction"),
            vae=small.small_autoencoder(),
            text_encoder=small.small_t5(),
            tokenizer=small.byte_tokenizer(),
        )


SPEC = ModelSpec(
    transformer_class="PixArtTransformer2DModel",
    groups=(BlockGroup("transformer_blocks", self_attention=("attn1",)),),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    modulated_input=modulated_input,
    per_image=(
        *("hidden_states", "timestep", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"),
        *("resolution", "aspect_ratio"),
    ),
    thresholds=THRESHOLDS,
)

# Binning knows no size as small as the toy's, and cleaning wants packages that are not required here.
_PLAIN = {"use_resolution_binning": False, "clean_caption": False}


def _ask(count: int) -> dict[str, Any]:
    return foxes(count) | _PLAIN | {"guidance_scale": 1.0}


FAMILY = Family(
    title="PixArt α, Σ",
    spec=SPEC,
    small={
        "pixart": SmallPipeline("PixArtAlphaPipeline", build_small, _ask, guided=lambda count: {"guidance_scale": 4.5}),
        "pixart-sigma": SmallPipeline(
            "PixArtSigmaPipeline", partial(build_small, sigma=True), _ask, guided=lambda count: {"guidance_scale": 4.5}
        ),
    },
    types={
        "pixart": ModelType(
            SPEC.transformer_class,
            ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
            None,
            "prompt",
            4.5,
            THRESHOLDS,
            toy=build_small,
            toy_arguments={"max_sequence_length": 64} | _PLAIN,
        ),
        "tiny-pixart": ModelType(
            SPEC.transformer_class,
            ("PixArtAlphaPipeline",),
            lambda: shipped("tiny-pixart"),
            "prompt",
            3.0,
            THRESHOLDS,
            toy=build_small,
            toy_arguments={"max_sequence_length": 64} | _PLAIN,
            call_arguments={"height": 64, "width": 64, "max_sequence_length": 16} | _PLAIN,
            configuration=TINY,
        ),
    },
)
