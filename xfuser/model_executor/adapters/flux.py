"""FLUX.1: two streams through dual blocks, then through single blocks that join them inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.family import Family, ModelType, SmallPipeline, foxes, shipped
from xfuser.model_executor.adapters.spec import BlockGroup, ModelSpec, TokenArgument

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline
    from torch import nn

THRESHOLDS = {"Fast": 0.05, "Tea": 0.4, "Fb": 0.08}


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


def build_small(seed: int = 0) -> FluxPipeline:
    """Three dual and five single blocks of 4 heads, 16 channels each, a 64-pixel image of 64 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    from xfuser.model_executor.adapters import small

    with small.seeded(seed):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=3,
            num_single_layers=5,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=small.HIDDEN,
            pooled_projection_dim=small.HIDDEN,
            axes_dims_rope=(4, 4, 8),
        )
        small.smooth_in_time(transformer.time_text_embed.timestep_embedder)
        return FluxPipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=small.small_autoencoder(),
            text_encoder=CLIPTextModel(small.small_clip_config()).eval(),
            tokenizer=small.byte_tokenizer(),
            text_encoder_2=small.small_t5(),
            tokenizer_2=small.byte_tokenizer(),
        )


_STREAMS = ("hidden_states", "encoder_hidden_states")
_RETURNS = ("encoder_hidden_states", "hidden_states")
_ROTARY = TokenArgument("image_rotary_emb", streams=(1, 0))

SPEC = ModelSpec(
    transformer_class="FluxTransformer2DModel",
    groups=tuple(
        BlockGroup(path, _STREAMS, _RETURNS, self_attention=("attn",), per_token=(_ROTARY,))
        for path in ("transformer_blocks", "single_transformer_blocks")
    ),
    conditioning=("encoder_hidden_states", "pooled_projections"),
    modulated_input=modulated_input,
    tea_coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    between_blocks=("controlnet_block_samples", "controlnet_single_block_samples"),
    layer_counts=("num_layers", "num_single_layers"),
    per_image=(
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "temb"),
        *("ip_adapter_image_embeds", "ip_hidden_states"),
    ),
    guidance="calls",
    packs=2,
    text_first=True,
    thresholds=THRESHOLDS,
)

_SHORT = {"max_sequence_length": 64}

FAMILY = Family(
    title="FLUX.1",
    spec=SPEC,
    small={
        "flux": SmallPipeline(
            "FluxPipeline", build_small, foxes, guided=lambda count: {"negative_prompt": "a dog", "true_cfg_scale": 2.0}
        )
    },
    types={
        "flux": ModelType(
            SPEC.transformer_class,
            ("FluxPipeline",),
            None,
            "prompt",
            3.5,
            THRESHOLDS,
            toy=build_small,
            toy_arguments=_SHORT,
            true_cfg=True,
        ),
        "tiny-flux": ModelType(
            SPEC.transformer_class,
            ("FluxPipeline",),
            lambda: shipped("tiny-flux"),
            "prompt",
            2.0,
            THRESHOLDS,
            toy=build_small,
            toy_arguments=_SHORT,
            # FluxPipeline would draw 512 x 512 pixels with 512 text tokens; this model was trained on these.
            call_arguments={"height": 64, "width": 64, "max_sequence_length": 16},
            configuration={
                "num_layers": 6,
                "num_single_layers": 6,
                "num_attention_heads": 4,
                "attention_head_dim": 28,
                "in_channels": 16,
            },
            num_inference_steps=28,
            true_cfg=True,
        ),
    },
)
