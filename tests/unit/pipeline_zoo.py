"""More than forty diffusers pipelines of toy size with random weights, to try a cache on: see `ZOO`."""

from __future__ import annotations

import diffusers as df
import torch
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from pipeline_zoo_parts import (
    ARRAY,
    PROMPT,
    SMALL,
    ZOO,
    Arguments,
    Case,
    no_text,
    noise,
    picture,
    small_vae,
    small_vocoder,
    stable_diffusion_parts,
    strengthen,
    text,
    text_unet,
    without_text,
    zoo,
)
from transformers import ClapTextConfig, ClapTextModelWithProjection

from xfuser.model_executor.adapters.dit import build_small as build_toy_dit
from xfuser.model_executor.adapters.flux import build_small as build_toy_flux
from xfuser.model_executor.adapters.pixart import build_small as build_toy_pixart
from xfuser.model_executor.adapters.sd3 import build_small as build_toy_sd3
from xfuser.model_executor.adapters.small import HIDDEN, byte_tokenizer

__all__ = ["ZOO", "Case"]

LATENT: Arguments = {"output_type": "latent"}
MIDDLE: Arguments = {"height": 64, "width": 64}  # 8 x 8 latents with the usual factor of 8, 16 x 16 of the toys
MASK = "prompt_attention_mask"
FOUR: Arguments = {"in_channels": 4, "out_channels": 4}
HEADS: Arguments = {"num_attention_heads": 4, "attention_head_dim": 8}
WIDE_HEADS: Arguments = {"num_attention_heads": 2, "attention_head_dim": 16}
FLOW: Arguments = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


# Images


@zoo("image", "transformer", "batch", lambda: {"class_labels": [7], "guidance_scale": 1.5, **ARRAY})
def DiTPipeline() -> df.DiTPipeline:
    """Build a sampler of images of a class."""
    return build_toy_dit()


TOY = {**PROMPT, **MIDDLE, **ARRAY, "max_sequence_length": 16}
PIXART = {**TOY, "use_resolution_binning": False, "clean_caption": False}


@zoo("image", "transformer", "batch", lambda: {**PIXART})
def PixArtAlphaPipeline() -> df.PixArtAlphaPipeline:
    """Build a transformer that looks at a text, with a multistep solver."""
    return build_toy_pixart()


@zoo("image", "transformer", "batch", lambda: {**PIXART})
def PixArtSigmaPipeline() -> df.PixArtSigmaPipeline:
    """Build PixArt's next version."""
    return build_toy_pixart(sigma=True)


@zoo("image", "transformer", "batch", lambda: {**TOY})
def StableDiffusion3Pipeline() -> df.StableDiffusion3Pipeline:
    """Build a transformer of two streams."""
    return build_toy_sd3()


@zoo("image", "transformer", "batch", lambda: {**TOY, "image": picture(64), "strength": 0.75})
def StableDiffusion3Img2ImgPipeline() -> df.StableDiffusion3Img2ImgPipeline:
    """Build the same from an image, which runs the last part of the steps."""
    return df.StableDiffusion3Img2ImgPipeline(**build_toy_sd3().components)


FLUX = {"prompt": "a fox", **MIDDLE, **ARRAY, "max_sequence_length": 16}
TRUE_CFG = {**FLUX, "negative_prompt": "a blur", "true_cfg_scale": 3.0}
KONTEXT = {**FLUX, "max_area": 64 * 64, "_auto_resize": False}


@zoo("image", "transformer", "none", lambda: {**FLUX})
def FluxPipeline() -> df.FluxPipeline:
    """Build a distilled Flux."""
    return build_toy_flux()


@zoo("image", "transformer", "calls", lambda: {**TRUE_CFG}, key="FluxPipeline-true-cfg")
def _guided_flux() -> df.FluxPipeline:
    """Build Flux to be guided in calls of its own."""
    return build_toy_flux()


@zoo("image", "transformer", "none", lambda: {**FLUX, "image": picture(64), "strength": 0.75})
def FluxImg2ImgPipeline() -> df.FluxImg2ImgPipeline:
    """Build Flux from an image."""
    return df.FluxImg2ImgPipeline(**build_toy_flux().components)


@zoo("image", "transformer", "none", lambda: {**KONTEXT, "image": picture(64)})
def FluxKontextPipeline() -> df.FluxKontextPipeline:
    """Build Flux with a second image among its tokens."""
    return df.FluxKontextPipeline(**build_toy_flux().components)


JOINT: Arguments = {"joint_attention_dim": HIDDEN, "num_single_layers": 1, "num_layers": 1, **WIDE_HEADS}


@zoo("image", "transformer", "batch", lambda: {**text(mask=MASK), **SMALL})
def AuraFlowPipeline() -> df.AuraFlowPipeline:
    """Build a transformer of two streams, then one."""
    layers = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": HIDDEN, **HEADS}
    transformer = df.AuraFlowTransformer2DModel(
        sample_size=8, caption_projection_dim=32, pos_embed_max_size=16, **layers
    )
    return without_text(df.AuraFlowPipeline, strengthen(transformer))


@zoo("image", "transformer", "calls", lambda: {**text(mask=MASK, dtype=torch.float32), **SMALL})
def ChromaPipeline() -> df.ChromaPipeline:
    """Build a Flux with guidance in calls of its own."""
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 1}
    transformer = df.ChromaTransformer2DModel(in_channels=16, axes_dims_rope=(4, 4, 8), **JOINT, **approximator)
    return without_text(df.ChromaPipeline, transformer)


LUMINA: Arguments = {"num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "hidden_size": 32, "num_layers": 2}


@zoo("image", "transformer", "batch", lambda: {**text(mask=MASK), **MIDDLE, **ARRAY, "clean_caption": False})
def LuminaPipeline() -> df.LuminaPipeline:
    """Build a transformer that predicts backwards and a variance too."""
    transformer = df.LuminaNextDiT2DModel(sample_size=8, cross_attention_dim=HIDDEN, **LUMINA)
    return without_text(df.LuminaPipeline, transformer)


@zoo("image", "transformer", "calls", lambda: {**text(mask=MASK), **MIDDLE, **ARRAY})
def Lumina2Pipeline() -> df.Lumina2Pipeline:
    """Build one stream of text and image, with guidance that keeps the prediction's length."""
    positions = {"axes_dim_rope": (4, 2, 2), "axes_lens": (64, 32, 32)}
    transformer = df.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, num_refiner_layers=1, cap_feat_dim=HIDDEN, **positions, **LUMINA
    )
    return without_text(df.Lumina2Pipeline, transformer)


SANA = {"height": 256, "width": 256, "use_resolution_binning": False, "negative_prompt": None, **LATENT}


@zoo("image", "transformer", "batch", lambda: {**text(mask=MASK), **SANA})
def SanaPipeline() -> df.SanaPipeline:
    """Build linear attention with a multistep solver of flows."""
    attention = {"num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32, **HEADS}
    transformer = df.SanaTransformer2DModel(num_layers=2, caption_channels=HIDDEN, sample_size=8, **attention, **FOUR)
    return without_text(df.SanaPipeline, transformer, df.DPMSolverMultistepScheduler(**FLOW), vae=False)


def _two_texts() -> Arguments:
    one = text(mask=MASK)
    return {**one, **{f"{name}_2": value for name, value in one.items()}, "use_resolution_binning": False}


@zoo("image", "transformer", "batch", lambda: {**_two_texts(), **SMALL})
def HunyuanDiTPipeline() -> df.HunyuanDiTPipeline:
    """Build a transformer with long skips, told the image's size."""
    texts = {"cross_attention_dim": HIDDEN, "cross_attention_dim_t5": HIDDEN, "pooled_projection_dim": HIDDEN}
    sizes = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "num_layers": 4}
    return df.HunyuanDiTPipeline(
        vae=small_vae(),
        transformer=df.HunyuanDiT2DModel(text_len=6, text_len_t5=6, **texts, **sizes, **HEADS),
        scheduler=df.DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **no_text("", "_2"),
    )


@zoo("image", "transformer", "calls", lambda: {**text(mask="prompt_embeds_mask"), **MIDDLE, **LATENT})
def QwenImagePipeline() -> df.QwenImagePipeline:
    """Build two streams with guidance that keeps the prediction's length."""
    layers = {"num_layers": 2, "joint_attention_dim": HIDDEN, "axes_dims_rope": (4, 6, 6), **WIDE_HEADS}
    transformer = df.QwenImageTransformer2DModel(in_channels=16, out_channels=4, **layers)
    return without_text(df.QwenImagePipeline, transformer, vae=False)


COGVIEW: Arguments = {"time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8}
COGVIEW |= {"text_embed_dim": HIDDEN, "num_layers": 2, **FOUR, **HEADS}


@zoo("image", "transformer", "batch", lambda: {**text(), **SMALL})
def CogView3PlusPipeline() -> df.CogView3PlusPipeline:
    """Build a transformer whose scheduler is handed its own last estimate."""
    transformer = df.CogView3PlusTransformer2DModel(**COGVIEW)
    return without_text(df.CogView3PlusPipeline, transformer, df.CogVideoXDPMScheduler(prediction_type="v_prediction"))


@zoo("image", "transformer", "calls", lambda: {**text(), **SMALL})
def CogView4Pipeline() -> df.CogView4Pipeline:
    """Build CogView with a flow and guidance in calls of its own."""
    transformer = df.CogView4Transformer2DModel(rope_axes_dim=(16, 16), **COGVIEW)
    return without_text(df.CogView4Pipeline, transformer, df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def _lists() -> Arguments:
    return {"prompt_embeds": [noise(6, HIDDEN)], "negative_prompt_embeds": [noise(6, HIDDEN, seed=2)]}


@zoo("image", "transformer", "batch", lambda: {**_lists(), **SMALL})
def ZImagePipeline() -> df.ZImagePipeline:
    """Build a transformer that is called with lists of images and of texts."""
    layers = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    transformer = df.ZImageTransformer2DModel(
        in_channels=4, cap_feat_dim=HIDDEN, axes_dims=[4, 6, 6], axes_lens=[64, 32, 32], **layers
    )
    return without_text(df.ZImagePipeline, transformer)


# Videos

CLIP: Arguments = {**MIDDLE, "num_frames": 5, **LATENT}  # two latent frames of 8 x 8
WAN = {"text_dim": HIDDEN, "freq_dim": 32, "ffn_dim": 32, "rope_max_seq_len": 32, "num_layers": 2, **FOUR, **HEADS}


@zoo("video", "transformer", "calls", lambda: {**text(), **CLIP})
def WanPipeline() -> df.WanPipeline:
    """Build Wan with one transformer and a multistep solver of flows."""
    transformer = df.WanTransformer3DModel(**WAN)
    return without_text(df.WanPipeline, transformer, df.UniPCMultistepScheduler(**FLOW), vae=False)


@zoo("video", "transformer", "calls", lambda: {**text(), **CLIP}, key="WanPipeline-two", denoisers=2)
def _two_wans() -> df.WanPipeline:
    """Build Wan with one transformer for the noisy steps and another for the rest."""
    first, second = (df.WanTransformer3DModel(**WAN) for _ in range(2))
    return df.WanPipeline(
        vae=None,
        transformer=first,
        transformer_2=second,
        boundary_ratio=0.6,
        scheduler=df.FlowMatchEulerDiscreteScheduler(),
        **no_text(),
    )


@zoo("video", "transformer", "batch", lambda: {**text(), **CLIP})
def CogVideoXPipeline() -> df.CogVideoXPipeline:
    """Build CogVideoX with its deterministic scheduler."""
    sizes = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6, "num_layers": 2}
    transformer = df.CogVideoXTransformer3DModel(time_embed_dim=8, text_embed_dim=HIDDEN, **sizes, **FOUR, **HEADS)
    scheduler = df.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return without_text(df.CogVideoXPipeline, transformer, scheduler, vae=False)


@zoo("video", "transformer", "batch", lambda: {**text(mask=MASK), **CLIP, "height": 128, "width": 128, "num_frames": 9})
def LTXPipeline() -> df.LTXPipeline:
    """Build LTX, whose latents are a row of tokens."""
    texts = {"cross_attention_dim": 32, "caption_channels": HIDDEN}
    transformer = df.LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_layers=2, **texts, **HEADS)
    scheduler = df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return without_text(df.LTXPipeline, transformer, scheduler, vae=False)


@zoo("video", "transformer", "batch", lambda: {**text(mask=MASK), **CLIP, "num_frames": 7})
def MochiPipeline() -> df.MochiPipeline:
    """Build Mochi, whose time runs from 0 to 1."""
    texts = {"pooled_projection_dim": 16, "text_embed_dim": HIDDEN, "max_sequence_length": 6}
    transformer = df.MochiTransformer3DModel(in_channels=4, time_embed_dim=8, num_layers=2, **texts, **HEADS)
    scheduler = df.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return without_text(df.MochiPipeline, transformer, scheduler, vae=False)


def _distilled() -> Arguments:
    return {**text(mask=MASK, negative=False), "pooled_prompt_embeds": noise(1, HIDDEN)}


@zoo("video", "transformer", "none", lambda: {**_distilled(), **CLIP})
def HunyuanVideoPipeline() -> df.HunyuanVideoPipeline:
    """Build a distilled transformer, told its guidance as a number."""
    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)}
    transformer = df.HunyuanVideoTransformer3DModel(
        text_embed_dim=HIDDEN, pooled_projection_dim=HIDDEN, **layers, **FOUR, **WIDE_HEADS
    )
    scheduler = df.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return without_text(df.HunyuanVideoPipeline, strengthen(transformer), scheduler, vae=False, texts=2)


LATTE = {**MIDDLE, **LATENT, "video_length": 2, "negative_prompt": None, "clean_caption": False}


@zoo("video", "transformer", "batch", lambda: {**text(), **LATTE})
def LattePipeline() -> df.LattePipeline:
    """Build blocks of space and of time by turns."""
    sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "video_length": 2}
    norms = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000}
    transformer = df.LatteTransformer3DModel(
        num_layers=2, cross_attention_dim=32, caption_channels=HIDDEN, **sizes, **norms, **HEADS
    )
    return without_text(df.LattePipeline, transformer, df.DDIMScheduler(), vae=False)


@zoo("video", "unet", "batch", lambda: {**PROMPT, **SMALL, "num_frames": 3})
def AnimateDiffPipeline() -> df.AnimateDiffPipeline:
    """Build an image UNet with layers of motion in it."""
    parts = stable_diffusion_parts(df.DDIMScheduler(beta_schedule="linear"))
    for name in ("safety_checker", "requires_safety_checker"):
        del parts[name]
    adapter = df.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    return df.AnimateDiffPipeline(motion_adapter=adapter, **parts)


@zoo("video", "unet", "batch", lambda: {**PROMPT, **SMALL, "num_frames": 3})
def TextToVideoSDPipeline() -> df.TextToVideoSDPipeline:
    """Build a UNet of three dimensions."""
    unet = df.UNet3DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,
    )
    parts = stable_diffusion_parts(df.DPMSolverSinglestepScheduler(prediction_type="v_prediction"))
    return df.TextToVideoSDPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=unet,
        scheduler=parts["scheduler"],
    )


# Audio


@zoo("audio", "unet", "none", lambda: {})
def DanceDiffusionPipeline() -> df.DanceDiffusionPipeline:
    """Build a sampler of waveforms with a multistep scheduler."""
    unet = df.UNet1DModel(sample_size=64, sample_rate=64, extra_in_channels=64, block_out_channels=(32, 32, 32))
    return df.DanceDiffusionPipeline(strengthen(unet, 0.5), df.IPNDMScheduler())


@zoo("audio", "transformer", "batch", lambda: {**text(), **ARRAY})
def StableAudioPipeline() -> df.StableAudioPipeline:
    """Build a transformer of a row of latents, told the length in seconds."""
    texts = {"cross_attention_dim": 32, "global_states_input_dim": 2 * HIDDEN, "cross_attention_input_dim": HIDDEN}
    transformer = df.StableAudioDiTModel(
        sample_size=32, num_layers=2, num_key_value_attention_heads=2, time_proj_dim=8, **texts, **FOUR, **HEADS
    )
    sizes = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 2], "channel_multiples": [1, 2]}
    return df.StableAudioPipeline(
        vae=df.AutoencoderOobleck(decoder_channels=8, decoder_input_channels=4, sampling_rate=16, **sizes),
        projection_model=StableAudioProjectionModel(HIDDEN, HIDDEN, 0, 32),
        transformer=transformer,
        scheduler=df.EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0),
        **no_text(),
    )


CLAP: Arguments = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@zoo("audio", "unet", "batch", lambda: {**PROMPT, "audio_length_in_s": 0.16, **ARRAY})
def AudioLDMPipeline() -> df.AudioLDMPipeline:
    """Build a UNet of spectrograms, which hears of the text through its class embedding."""
    config = ClapTextConfig(vocab_size=len(byte_tokenizer()), pad_token_id=0, projection_dim=HIDDEN, **CLAP)
    unet = text_unet(
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=HIDDEN,
        class_embeddings_concat=True,
    )
    return df.AudioLDMPipeline(
        vae=small_vae(channels=1),
        text_encoder=ClapTextModelWithProjection(config),
        tokenizer=byte_tokenizer(),
        unet=unet,
        scheduler=df.DDIMScheduler(),
        vocoder=small_vocoder(16),
    )
