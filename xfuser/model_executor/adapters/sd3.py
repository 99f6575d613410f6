"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two streams through dual blocks; the last one drops the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.family import Family, ModelType, SmallPipeline, foxes
from xfuser.model_executor.adapters.spec import BlockGroup, ModelSpec

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusion3Pipeline
    from torch import nn

# At these the toy skips about half of its block evaluations in 20 steps with Tea and Fb; no real weights were at hand.
THRESHOLDS = {"Fast": 0.05, "Tea": 0.04, "Fb": 0.07}
HEADS, HEAD_CHANNELS = 4, 16  # of the toy


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    # A block with a second attention (3.5) modulates for that one too, and returns it last.
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def build_small(seed: int = 0) -> StableDiffusion3Pipeline:
    """Eight blocks of 4 heads, 16 channels each, half of them with a second attention as in 3.5; 64 image tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    from xfuser.model_executor.adapters import small

    with small.seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=small.SIZE // 4,
            pos_embed_max_size=small.SIZE // 4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=8,
            attention_head_dim=HEAD_CHANNELS,
            num_attention_heads=HEADS,
            caption_projection_dim=HEADS * HEAD_CHANNELS,
            joint_attention_dim=2 * small.HIDDEN,
            pooled_projection_dim=2 * small.HIDDEN,
            dual_attention_layers=(0, 1, 2, 3),
            qk_norm="rms_norm",
        )
        small.smooth_in_time(transformer.time_text_embed.timestep_embedder)
        # The text that the transformer sees is both CLIPs' channels side by side, then as many of T5.
        return StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=small.small_autoencoder(),
            text_encoder=CLIPTextModelWithProjection(small.small_clip_config()).eval(),
            tokenizer=small.byte_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(small.small_clip_config()).eval(),
            tokenizer_2=small.byte_tokenizer(),
            text_encoder_3=small.small_t5(2 * small.HIDDEN),
            tokenizer_3=small.byte_tokenizer(),
        )


SPEC = ModelSpec(
    transformer_class="SD3Transformer2DModel",
    groups=(
        BlockGroup(
            "transformer_blocks",
            takes=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            self_attention=("attn", "attn2"),
        ),
    ),
    conditioning=("encoder_hidden_states", "pooled_projections"),
    modulated_input=modulated_input,
    between_blocks=("block_controlnet_hidden_states",),
    skips_blocks=("skip_layers",),
    per_image=(
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "temb"),
        *("block_controlnet_hidden_states", "ip_adapter_image_embeds", "ip_hidden_states"),
    ),
    thresholds=THRESHOLDS,
)

FAMILY = Family(
    title="Stable Diffusion 3",
    spec=SPEC,
    small={
        "sd3": SmallPipeline(
            "StableDiffusion3Pipeline",
            build_small,
            lambda count: foxes(count) | {"guidance_scale": 1.0},
            guided=lambda count: {"guidance_scale": 7.0},
        )
    },
    types={
        "sd3": ModelType(
            SPEC.transformer_class,
            ("StableDiffusion3Pipeline",),
            None,
            "prompt",
            7.0,
            THRESHOLDS,
            toy=build_small,
            toy_arguments={"max_sequence_length": 64},
        )
    },
)
