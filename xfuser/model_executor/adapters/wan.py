"""Wan 2.1 and 2.2 (arXiv 2503.20314): one stream of a video's tokens; 2.2 has one transformer for the noisy steps and
another for the rest, or a timestep a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.family import Family, ModelType, SmallPipeline, shipped
from xfuser.model_executor.adapters.spec import BlockGroup, ModelSpec, TokenArgument

if TYPE_CHECKING:
    import torch
    from diffusers import WanPipeline
    from torch import nn

# The methods' common ones. TeaCache's for Wan go with a polynomial of another signal, the time embedding's change.
THRESHOLDS = {"Fast": 0.05, "Tea": 0.05, "Fb": 0.05}
HEADS, HEAD_CHANNELS = 4, 12  # of the toy
TEXT_TOKENS = 16
# What tells tiny-wan from others, and what its training builds (scripts/tiny_wan_parts.py).
TINY = {
    "patch_size": [1, 1, 1],
    "num_layers": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 32,
    "ffn_dim": 384,
}
BOUNDARY = 0.6  # share of the noise above which the first of two transformers is used


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    hidden_states, temb = arguments["hidden_states"], arguments["temb"]
    if temb.dim() == 4:  # a timestep a token: [B, P, 6, D]
        rows = block.scale_shift_table.unsqueeze(0) + temb.float()
        shift, scale = rows[:, :, 0], rows[:, :, 1]
    else:
        rows = block.scale_shift_table + temb.float()
        shift, scale = rows[:, 0:1], rows[:, 1:2]
    return (block.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)


def build_small(transformers: int = 1, timestep_a_token: bool = False, seed: int = 0) -> WanPipeline:
    """Transformers of four blocks of 4 heads, 12 channels each; two latent frames of 16 tokens."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    from xfuser.model_executor.adapters import small

    with small.seeded(seed):
        parts = [
            WanTransformer3DModel(
                num_attention_heads=HEADS,
                attention_head_dim=HEAD_CHANNELS,
                in_channels=4,
                out_channels=4,
                text_dim=small.HIDDEN,
                freq_dim=32,
                ffn_dim=96,
                num_layers=4,
                rope_max_seq_len=32,
            ).eval()
            for _ in range(transformers)
        ]
        for each in parts:
            small.smooth_in_time(each.condition_embedder.time_embedder)
        autoencoder = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
        return WanPipeline(
            transformer=parts[0],
            transformer_2=parts[1] if transformers > 1 else None,
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            vae=autoencoder.eval(),
            text_encoder=small.small_t5(),
            tokenizer=small.byte_tokenizer(),
            boundary_ratio=BOUNDARY if transformers > 1 else None,
            expand_timesteps=timestep_a_token,
        )


def _ask(count: int) -> dict[str, Any]:
    """Ask for five frames of 64 x 64 pixels; texts come encoded, since cleaning them wants a package of its own."""
    from xfuser.model_executor.adapters import small

    texts = small.noise(count, TEXT_TOKENS, small.HIDDEN)
    return {"prompt_embeds": texts, "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 1.0}


def _guided(count: int) -> dict[str, Any]:
    from xfuser.model_executor.adapters import small

    return {"negative_prompt_embeds": small.noise(count, TEXT_TOKENS, small.HIDDEN, seed=2), "guidance_scale": 4.0}


SPEC = ModelSpec(
    transformer_class="WanTransformer3DModel",
    groups=(
        BlockGroup(
            "blocks",
            self_attention=("attn1",),
            per_token=(TokenArgument("rotary_emb", dim=1), TokenArgument("temb", dim=1, dims=4)),
        ),
    ),
    conditioning=("encoder_hidden_states", "encoder_hidden_states_image"),
    modulated_input=modulated_input,
    components=("transformer", "transformer_2"),
    per_image=("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "temb"),
    guidance="calls",
    thresholds=THRESHOLDS,
)

FAMILY = Family(
    title="Wan 2.1, 2.2",
    spec=SPEC,
    small={
        "wan": SmallPipeline("WanPipeline", build_small, _ask, guided=_guided, makes="frames"),
        "wan-2.2": SmallPipeline(
            "WanPipeline", partial(build_small, transformers=2), _ask, guided=_guided, makes="frames"
        ),
        "wan-2.2-5b": SmallPipeline(
            "WanPipeline", partial(build_small, timestep_a_token=True), _ask, guided=_guided, makes="frames"
        ),
    },
    types={
        "wan": ModelType(
            SPEC.transformer_class,
            ("WanPipeline",),
            None,
            "prompt",
            5.0,
            THRESHOLDS,
            toy=build_small,
            toy_arguments={"num_frames": 5, "max_sequence_length": TEXT_TOKENS},
            call_arguments={"height": 480, "width": 832, "num_frames": 81},
            makes="frames",
        ),
        "tiny-wan": ModelType(
            SPEC.transformer_class,
            ("WanPipeline",),
            lambda: shipped("tiny-wan"),
            "prompt",
            5.0,
            THRESHOLDS,
            toy=build_small,
            toy_arguments={"num_frames": 5, "max_sequence_length": TEXT_TOKENS},
            # WanPipeline would make 81 frames of 832 x 480 pixels; this model was trained on these.
            call_arguments={"height": 64, "width": 64, "num_frames": 13, "max_sequence_length": TEXT_TOKENS},
            configuration=TINY,
            makes="frames",
        ),
    },
)
