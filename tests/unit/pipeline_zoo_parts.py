"""The zoo's cases and how they are registered, the small models and tensors that they share, and its image UNets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as df
import numpy as np
import torch
from torch import nn
from transformers import CLIPTextModel, SpeechT5HifiGan, SpeechT5HifiGanConfig

from xfuser.model_executor.adapters.small import HIDDEN, byte_tokenizer, seeded, small_clip_config

Build = Callable[[], df.DiffusionPipeline]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Describe one pipeline of toy size and one way to call it.

    ``guidance`` says how the denoiser sees the unconditional half: in one ``batch`` with the conditional one, in
    ``calls`` of its own, or not at all (``none``).
    """

    name: str
    build: Build
    arguments: Callable[[], Arguments]
    output: Callable[[Any], np.ndarray]
    kind: str
    denoiser: str
    guidance: str
    denoisers: int = 1


ZOO: dict[str, Case] = {}
ARRAY: Arguments = {"output_type": "np"}
SMALL: Arguments = {"height": 16, "width": 16, **ARRAY}  # 8 x 8 latents with the small autoencoder
PROMPT: Arguments = {"prompt": "a fox", "negative_prompt": "a blur"}


def zoo(
    kind: str, denoiser: str, guidance: str, arguments: Callable[[], Arguments], *, key: str = "", denoisers: int = 1
) -> Callable[[Build], Build]:
    """Register a builder under its pipeline's name, which is the function's, or under ``key``: a name and suffix."""

    def register(assemble: Build) -> Build:
        def build() -> df.DiffusionPipeline:
            with seeded(0):
                pipeline = assemble()
                for part in pipeline.components.values():
                    if isinstance(part, nn.Module):
                        wake(part.eval())
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        build.__doc__ = assemble.__doc__
        name = key or assemble.__name__
        ZOO[name] = Case(name.split("-")[0], build, arguments, array_of, kind, denoiser, guidance, denoisers)
        return build

    return register


@torch.no_grad()
def wake(model: nn.Module, scale: float = 0.1) -> None:
    """Replace parameters that start at zero with noise, so that no layer is mute."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0.0, scale)


@torch.no_grad()
def strengthen(model: nn.Module, factor: float = 2.0) -> nn.Module:
    """Scale a model's matrices, where its random ones are too small for the text to matter, or too large."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)
    return model


def array_of(result: Any) -> np.ndarray:
    """Return the images, frames or audios of a pipeline's result."""
    for name in ("images", "frames", "audios"):
        if name in result:
            value = result[name]
            break
    else:
        raise TypeError(f"{type(result).__name__} has no images, frames or audios")
    if isinstance(value, torch.Tensor):
        return value.float().numpy()
    return np.stack([item.float().numpy() if isinstance(item, torch.Tensor) else np.asarray(item) for item in value])


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    """Draw a fixed normal tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(size: int = 16) -> torch.Tensor:
    """Draw a fixed image of values from 0 to 1."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(7))


def text(
    width: int = HIDDEN, tokens: int = 6, *, mask: str = "", negative: bool = True, dtype: torch.dtype = torch.long
) -> Arguments:
    """Make the embeddings of a prompt and of a negative one, with masks named ``mask`` where a pipeline asks."""
    made: Arguments = {}
    for seed, prefix in enumerate(("", "negative_") if negative else ("",), start=1):
        made[f"{prefix}prompt_embeds"] = noise(1, tokens, width, seed=seed)
        if mask:
            made[f"{prefix}{mask}"] = torch.ones(1, tokens, dtype=dtype)
    return made


def small_vae(latent_channels: int = 4, channels: int = 3) -> df.AutoencoderKL:
    """Build an autoencoder that halves height and width."""
    return df.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def small_unet(channels: int = 3) -> df.UNet2DModel:
    """Build an unconditional UNet of two levels for 8 x 8 samples."""
    return df.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )


UNET: Arguments = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": HIDDEN,
}


def text_unet(**settings: Any) -> df.UNet2DConditionModel:
    """Build a UNet of two levels that looks at a text, for 8 x 8 samples."""
    return df.UNet2DConditionModel(
        **{"sample_size": 8, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **UNET, **settings}
    )


def stable_diffusion_parts(scheduler: Any, **unet: Any) -> Arguments:
    """Build what every Stable Diffusion pipeline takes; a prompt is passed as text."""
    return {
        "vae": small_vae(),
        "text_encoder": CLIPTextModel(small_clip_config()),
        "tokenizer": byte_tokenizer(),
        "unet": text_unet(**unet),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def without_text(
    pipeline: type[df.DiffusionPipeline],
    transformer: nn.Module,
    scheduler: Any = None,
    *,
    vae: bool = True,
    texts: int = 1,
) -> df.DiffusionPipeline:
    """Assemble a pipeline of a transformer alone, by default with an Euler sampler of flows."""
    return pipeline(
        transformer=transformer,
        scheduler=scheduler or df.FlowMatchEulerDiscreteScheduler(),
        vae=small_vae() if vae else None,
        **no_text(*("", "_2")[:texts]),
    )


def no_text(*numbers: str) -> Arguments:
    """Leave the text encoders out; their number is given by their suffixes."""
    return {f"{part}{number}": None for number in numbers or ("",) for part in ("text_encoder", "tokenizer")}


def small_vocoder(mels: int) -> SpeechT5HifiGan:
    """Build a vocoder of 4 samples a frame at 400 samples a second."""
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=mels,
            sampling_rate=400,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
            initializer_range=0.2,
        )
    )


# Images, UNets


@zoo("image", "unet", "none", lambda: {**ARRAY})
def DDPMPipeline() -> df.DDPMPipeline:
    """Build a sampler of pixels that adds noise every step."""
    return df.DDPMPipeline(small_unet(), df.DDPMScheduler())


@zoo("image", "unet", "none", lambda: {**ARRAY})
def DDIMPipeline() -> df.DDIMPipeline:
    """Build a sampler of pixels."""
    return df.DDIMPipeline(small_unet(), df.DDIMScheduler())


@zoo("image", "unet", "none", lambda: {**ARRAY})
def LDMPipeline() -> df.LDMPipeline:
    """Build an unconditional sampler of quantised latents."""
    vqvae = df.VQModel(block_out_channels=(8,), latent_channels=3, norm_num_groups=4, num_vq_embeddings=16)
    return df.LDMPipeline(vqvae, small_unet(), df.DDIMScheduler())


@zoo("image", "unet", "none", lambda: {**ARRAY})
def ConsistencyModelPipeline() -> df.ConsistencyModelPipeline:
    """Build a consistency model, whose scheduler scales the model's input."""
    return df.ConsistencyModelPipeline(small_unet(), df.CMStochasticIterativeScheduler(num_train_timesteps=40))


@zoo("image", "unet", "batch", lambda: {**PROMPT, **SMALL})
def StableDiffusionPipeline() -> df.StableDiffusionPipeline:
    """Build Stable Diffusion with its usual scheduler, which calls the denoiser once more than there are steps."""
    return df.StableDiffusionPipeline(**stable_diffusion_parts(df.PNDMScheduler(skip_prk_steps=True)))


@zoo("image", "unet", "batch", lambda: {**PROMPT, **ARRAY, "image": picture(), "strength": 0.75})
def StableDiffusionImg2ImgPipeline() -> df.StableDiffusionImg2ImgPipeline:
    """Build image to image, which runs the last part of the steps."""
    return df.StableDiffusionImg2ImgPipeline(
        **stable_diffusion_parts(df.EulerDiscreteScheduler(prediction_type="v_prediction"))
    )


@zoo(
    "image",
    "unet",
    "batch",
    lambda: {**PROMPT, **SMALL, "image": picture(), "mask_image": picture()[:, :1].round(), "strength": 1.0},
)
def StableDiffusionInpaintPipeline() -> df.StableDiffusionInpaintPipeline:
    """Build inpainting with a plain UNet, which overwrites the latents outside the mask after every step."""
    return df.StableDiffusionInpaintPipeline(**stable_diffusion_parts(df.DDIMScheduler()))


@zoo("image", "unet", "batch", lambda: {**PROMPT, **SMALL, "image": picture()})
def StableDiffusionControlNetPipeline() -> df.StableDiffusionControlNetPipeline:
    """Build Stable Diffusion with a second network that steers the first."""
    controlnet = df.ControlNetModel(conditioning_embedding_out_channels=(8, 16), **UNET)
    parts = stable_diffusion_parts(df.UniPCMultistepScheduler(prediction_type="v_prediction"))
    return df.StableDiffusionControlNetPipeline(controlnet=controlnet, **parts)


@zoo("image", "unet", "batch", lambda: {**PROMPT, **SMALL})
def StableDiffusionPAGPipeline() -> df.StableDiffusionPAGPipeline:
    """Build perturbed-attention guidance, which makes a batch of three."""
    return df.StableDiffusionPAGPipeline(
        **stable_diffusion_parts(df.HeunDiscreteScheduler(prediction_type="v_prediction")), pag_applied_layers="mid"
    )


@zoo("image", "unet", "none", lambda: {"prompt": "a fox", **SMALL})
def LatentConsistencyModelPipeline() -> df.LatentConsistencyModelPipeline:
    """Build a latent consistency model, told its guidance as a number."""
    return df.LatentConsistencyModelPipeline(
        **stable_diffusion_parts(df.LCMScheduler(prediction_type="v_prediction"), time_cond_proj_dim=32)
    )


def _pooled() -> Arguments:
    return {"pooled_prompt_embeds": noise(1, HIDDEN, seed=3), "negative_pooled_prompt_embeds": noise(1, HIDDEN, seed=4)}


@zoo("image", "unet", "batch", lambda: {**text(), **_pooled(), **SMALL})
def StableDiffusionXLPipeline() -> df.StableDiffusionXLPipeline:
    """Build the XL version with an ancestral scheduler."""
    unet = text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + HIDDEN,
        use_linear_projection=True,
    )
    return df.StableDiffusionXLPipeline(
        vae=small_vae(),
        unet=unet,
        scheduler=df.EulerAncestralDiscreteScheduler(prediction_type="v_prediction"),
        **no_text("", "_2"),
    )


@zoo(
    "image",
    "unet",
    "batch",
    lambda: {"image_embeds": noise(1, 32), "negative_image_embeds": noise(1, 32, seed=2), **SMALL},
)
def KandinskyV22Pipeline() -> df.KandinskyV22Pipeline:
    """Build Kandinsky's decoder, whose UNet predicts a variance too."""
    unet = text_unet(out_channels=8, encoder_hid_dim=32, encoder_hid_dim_type="image_proj", addition_embed_type="image")
    movq = df.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32),
        latent_channels=4,
        num_vq_embeddings=16,
        norm_type="spatial",
        vq_embed_dim=4,
    )
    return df.KandinskyV22Pipeline(unet, df.DDPMScheduler(variance_type="learned_range"), movq)


@zoo("image", "unet", "batch", lambda: {**text(), **ARRAY})
def IFPipeline() -> df.IFPipeline:
    """Build DeepFloyd's first stage, in pixels and with a predicted variance."""
    return df.IFPipeline(
        unet=text_unet(in_channels=3, out_channels=6),
        scheduler=df.DDPMScheduler(variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **no_text(),
    )
