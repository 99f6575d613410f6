"""A StableDiffusion3Pipeline of toy size with random weights: every real part, no download. It draws coloured noise."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from xfuser.model_executor.pipelines.toy_parts import (
    HIDDEN,
    SIZE,
    byte_tokenizer,
    seeded,
    small_autoencoder,
    small_clip_config,
    small_t5,
    smooth_in_time,
)

HEADS, HEAD_CHANNELS = 4, 16


def build_toy_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Eight blocks of 4 heads, 16 channels each, half of them with a second attention as in 3.5; 64 image tokens."""
    with seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=SIZE // 4,
            pos_embed_max_size=SIZE // 4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=8,
            attention_head_dim=HEAD_CHANNELS,
            num_attention_heads=HEADS,
            caption_projection_dim=HEADS * HEAD_CHANNELS,
            joint_attention_dim=2 * HIDDEN,
            pooled_projection_dim=2 * HIDDEN,
            dual_attention_layers=(0, 1, 2, 3),
            qk_norm="rms_norm",
        )
        smooth_in_time(transformer.time_text_embed.timestep_embedder)
        # The text that the transformer sees is both CLIPs' channels side by side, then as many of T5.
        return StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=small_autoencoder(),
            text_encoder=CLIPTextModelWithProjection(small_clip_config()).eval(),
            tokenizer=byte_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(small_clip_config()).eval(),
            tokenizer_2=byte_tokenizer(),
            text_encoder_3=small_t5(2 * HIDDEN),
            tokenizer_3=byte_tokenizer(),
        )
