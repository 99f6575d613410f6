"""PixArt pipelines of toy size with random weights: every real part, no download. Their images are coloured noise."""

from __future__ import annotations

from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from xfuser.model_executor.pipelines.toy_parts import (
    HIDDEN,
    SIZE,
    byte_tokenizer,
    seeded,
    small_autoencoder,
    small_t5,
    smooth_in_time,
)

HEADS, HEAD_CHANNELS = 4, 12  # their product must be divisible by 3, for alpha's embedding of the image size


def build_toy_pixart(sigma: bool = False, seed: int = 0) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """Eight blocks of 4 heads, 12 channels each, a 64-pixel image of 64 tokens.

    Alpha is told the image's size and aspect ratio besides, as its 1024-pixel model is, which diffusers knows by its
    sample size of 128.
    """
    with seeded(seed):
        transformer = PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_CHANNELS,
            cross_attention_dim=HEADS * HEAD_CHANNELS,
            in_channels=4,
            out_channels=8,
            num_layers=8,
            sample_size=SIZE // 4 if sigma else 128,
            patch_size=2,
            caption_channels=HIDDEN,
        )
        smooth_in_time(transformer.adaln_single.emb.timestep_embedder)
        return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
            transformer=transformer.eval(),
            # Taken for a noise prediction, as PixArt's is, random outputs would blow the first step up a hundredfold.
            scheduler=DPMSolverMultistepScheduler(prediction_type="v_prediction"),
            vae=small_autoencoder(),
            text_encoder=small_t5(),
            tokenizer=byte_tokenizer(),
        )
