"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two streams through dual blocks; the last one drops the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xfuser.config import thresholds
from xfuser.model_executor.adapters.declaration import ModelDeclaration


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    # A block with a second attention (3.5) modulates for that one too, and returns it last.
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


DECLARATION = ModelDeclaration(
    transformer_class="SD3Transformer2DModel",
    block_lists=("transformer_blocks",),
    streams=("hidden_states", "encoder_hidden_states"),
    returns=("encoder_hidden_states", "hidden_states"),
    conditioning=("encoder_hidden_states", "pooled_projections"),
    modulated_input=modulated_input,
    between_blocks=("block_controlnet_hidden_states",),
    skips_blocks=("skip_layers",),
    self_attention=("attn", "attn2"),
    per_image=(
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "temb"),
        *("block_controlnet_hidden_states", "ip_adapter_image_embeds", "ip_hidden_states"),
    ),
    thresholds=thresholds.SD3,
)
