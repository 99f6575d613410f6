"""HunyuanDiT (arXiv 2405.08748): one stream; the later half of the blocks also reads what the earlier half gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.family import Family, SmallPipeline
from xfuser.model_executor.adapters.spec import BlockGroup, ModelSpec, TokenArgument

if TYPE_CHECKING:
    import torch
    from diffusers import HunyuanDiTPipeline
    from torch import nn

HEADS, HEAD_CHANNELS = 4, 16  # of the toy
SIDE = 128  # pixels of the toy's images: its positions count on an autoencoder that makes eighths


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.norm1(arguments["hidden_states"], arguments["temb"])


def build_small(seed: int = 0) -> HunyuanDiTPipeline:
    """Six blocks of 4 heads, 16 channels each, the last two with a long skip; 64 image tokens."""
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    from xfuser.model_executor.adapters import small

    with small.seeded(seed):
        transformer = HunyuanDiT2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_CHANNELS,
            in_channels=4,
            patch_size=2,
            sample_size=SIDE // 8,
            hidden_size=HEADS * HEAD_CHANNELS,
            num_layers=6,
            cross_attention_dim=small.HIDDEN,
            cross_attention_dim_t5=small.HIDDEN,
            pooled_projection_dim=small.HIDDEN,
        )
        small.smooth_in_time(transformer.time_extra_emb.timestep_embedder)
        return HunyuanDiTPipeline(
            transformer=transformer.eval(),
            scheduler=DDPMScheduler(prediction_type="v_prediction"),
            vae=small.small_autoencoder(levels=4),
            text_encoder=small.small_bert(),
            tokenizer=small.byte_tokenizer(),
            text_encoder_2=small.small_t5(),
            tokenizer_2=small.byte_tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _ask(count: int) -> dict[str, Any]:
    sizes = {"height": SIDE, "width": SIDE, "use_resolution_binning": False}
    return {"prompt": [f"fox number {index}" for index in range(count)], "guidance_scale": 1.0, **sizes}


SPEC = ModelSpec(
    transformer_class="HunyuanDiT2DModel",
    groups=(
        BlockGroup(
            "blocks",
            self_attention=("attn1",),
            per_token=(TokenArgument("image_rotary_emb"), TokenArgument("skip", dim=1, is_made_of_tokens=True)),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_hidden_states_t5"),
    modulated_input=modulated_input,
    contiguous=False,
    between_blocks=("controlnet_block_samples",),
    per_image=(
        *("hidden_states", "timestep", "encoder_hidden_states", "text_embedding_mask", "encoder_hidden_states_t5"),
        *("text_embedding_mask_t5", "image_meta_size", "style", "controlnet_block_samples", "temb", "skip"),
    ),
)

FAMILY = Family(
    title="HunyuanDiT",
    spec=SPEC,
    small={
        "hunyuan-dit": SmallPipeline(
            "HunyuanDiTPipeline", build_small, _ask, guided=lambda count: {"guidance_scale": 5.0}
        )
    },
)
