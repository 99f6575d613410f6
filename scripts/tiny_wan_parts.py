"""The parts of ``tiny-wan`` before training: autoencoder, text, transformer and scheduler."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock, unpatchify
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.model_executor.adapters.wan import TEXT_TOKENS, TINY  # noqa: E402

LATENT_CHANNELS = TINY["in_channels"]


def build_autoencoder() -> AutoencoderKLWan:
    """Latents of 32 channels at a sixteenth of height and width, a fourth of the frames after the first.

    As Wan 2.2's small one: its own first and last convolutions take patches, here of 4 x 4 pixels, and shortcuts lead
    round what halves and doubles. 3-D convolutions at more places would take most of the training.
    """
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        is_residual=True,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    )
    _prepare(vae)
    return vae


@torch.no_grad()
def _prepare(vae: AutoencoderKLWan) -> None:
    """Set weights so that what differs between clips reaches the output at full strength from the first step on.

    With the default ones it arrives a hundred times weaker than what all clips have in common. Then the common part is
    learnt alone, and grows until the norms leave nothing of the rest.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            # At first a frame is made of itself alone, as an image: what one learns from images holds for clips.
            own = module.weight if isinstance(module, nn.Conv2d) else module.weight[:, :, -1]
            nn.init.kaiming_normal_(own, nonlinearity="linear")
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight[:, :, -1, 0, 0]
            weight.copy_(torch.eye(module.dim).repeat(len(weight) // module.dim, 1))
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6  # latents begin with little noise
    vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    vae.decoder.conv_out.bias.fill_(0.6)  # light grounds, in [-1, 1]


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decode as the autoencoder does, but for the last clamp to [-1, 1], past which there would be no gradient."""
    vae.clear_cache()
    hidden_states = vae.post_quant_conv(latents)
    frames = []
    for index, chunk in enumerate(hidden_states.split(1, dim=2)):
        vae._conv_idx = [0]
        frames.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)


def build_transformer(text_channels: int) -> WanTransformer3DModel:
    """Eight blocks of 4 heads, 32 channels each; each place of the latents is a token."""
    sizes = {**TINY, "patch_size": tuple(TINY["patch_size"]), "out_channels": LATENT_CHANNELS}
    transformer = WanTransformer3DModel(text_dim=text_channels, freq_dim=128, rope_max_seq_len=32, **sizes)
    # Each block starts as the identity and the output as zero (DiT, arXiv 2212.09748, section 3.2).
    for layer in (transformer.condition_embedder.time_proj, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_scheduler() -> UniPCMultistepScheduler:
    """UniPC (arXiv 2302.04867) on rectified flow's sigmas, as Wan's own models have."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


class EagerAttention(WanAttnProcessor):
    """Wan's attention by two products and a softmax: the fused one's backward pass in bfloat16 is slow on a CPU."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(read)), attn.to_v(read)
        query, key, value = (each.unflatten(2, (attn.heads, -1)) for each in (query, key, value))
        if rotary_emb is not None:
            query, key = (rotate(each, *rotary_emb) for each in (query, key))
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        found = weights.softmax(dim=-1).to(value.dtype) @ value
        return attn.to_out[1](attn.to_out[0](found.transpose(1, 2).flatten(2)))


def rotate(hidden_states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn pairs of channels by their position's angles."""
    first, second = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., 0::2], sines[..., 1::2]
    turned = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.flatten(-2).to(hidden_states.dtype)


@dataclass(frozen=True)
class Text:
    """tiny-flux's T5 encoder and tokenizer, in single precision and not trained any more."""

    encoder: T5EncoderModel
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, flux: Path) -> Text:
        """Read them from a tiny-flux's folder."""
        encoder = T5EncoderModel.from_pretrained(flux / "text_encoder_2").float()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(flux / "tokenizer_2")
        return cls(encoder.eval().requires_grad_(False), tokenizer)

    @property
    def channels(self) -> int:
        return self.encoder.config.d_model

    @torch.no_grad()
    def encode(self, phrases: list[str]) -> torch.Tensor:
        """States [N, 16, channels], zero past each phrase's end, as WanPipeline computes them."""
        told = self.tokenizer(
            phrases, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        states = self.encoder(told.input_ids, told.attention_mask).last_hidden_state
        return states * told.attention_mask[..., None]
