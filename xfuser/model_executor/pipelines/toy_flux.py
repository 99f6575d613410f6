"""A FluxPipeline of toy size with random weights: every real part, no download. Its images are coloured noise."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from xfuser.model_executor.pipelines.toy_parts import (
    HIDDEN,
    byte_tokenizer,
    seeded,
    small_autoencoder,
    small_clip_config,
    small_t5,
    smooth_in_time,
)


def build_toy_flux(seed: int = 0) -> FluxPipeline:
    """Three dual and five single blocks of 4 heads, 16 channels each, a 64-pixel image of 64 tokens."""
    with seeded(seed):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=3,
            num_single_layers=5,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=HIDDEN,
            pooled_projection_dim=HIDDEN,
            axes_dims_rope=(4, 4, 8),
        )
        smooth_in_time(transformer.time_text_embed.timestep_embedder)
        return FluxPipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=small_autoencoder(),
            text_encoder=CLIPTextModel(small_clip_config()).eval(),
            tokenizer=byte_tokenizer(),
            text_encoder_2=small_t5(),
            tokenizer_2=byte_tokenizer(),
        )
