"""AuraFlow: two streams through joint blocks, then text and image as one row of tokens through single blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.family import Family, SmallPipeline, foxes
from xfuser.model_executor.adapters.spec import BlockGroup, ModelSpec

if TYPE_CHECKING:
    import torch
    from diffusers import AuraFlowPipeline
    from torch import nn

HEADS, HEAD_CHANNELS = 4, 16  # of the toy


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def build_small(seed: int = 0) -> AuraFlowPipeline:
    """Two joint and four single blocks of 4 heads, 16 channels each; 64 image tokens, and 8 that the model has."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from xfuser.model_executor.adapters import small

    with small.seeded(seed):
        transformer = AuraFlowTransformer2DModel(
            sample_size=small.SIZE // 4,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=4,
            attention_head_dim=HEAD_CHANNELS,
            num_attention_heads=HEADS,
            joint_attention_dim=small.HIDDEN,
            caption_projection_dim=HEADS * HEAD_CHANNELS,
            pos_embed_max_size=64,
        )
        small.smooth_in_time(transformer.time_step_proj)
        small.strengthen(transformer)
        return AuraFlowPipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
            vae=small.small_autoencoder(),
            text_encoder=small.small_t5(),
            tokenizer=small.byte_tokenizer(),
        )


SPEC = ModelSpec(
    transformer_class="AuraFlowTransformer2DModel",
    groups=(
        BlockGroup(
            "joint_transformer_blocks",
            takes=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            self_attention=("attn",),
        ),
        BlockGroup("single_transformer_blocks", joins=(1, 0), self_attention=("attn",)),
    ),
    conditioning=("encoder_hidden_states",),
    modulated_input=modulated_input,
    layer_counts=("num_mmdit_layers", "num_single_dit_layers"),
    per_image=("hidden_states", "encoder_hidden_states", "timestep", "temb"),
    text_first=True,
)

FAMILY = Family(
    title="AuraFlow",
    spec=SPEC,
    small={
        "auraflow": SmallPipeline(
            "AuraFlowPipeline",
            build_small,
            lambda count: foxes(count) | {"guidance_scale": 1.0},
            guided=lambda count: {"guidance_scale": 3.5},
        )
    },
)
