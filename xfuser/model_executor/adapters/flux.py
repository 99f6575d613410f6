"""FLUX.1: two streams through dual blocks, then through single blocks that join them inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xfuser.config import thresholds
from xfuser.model_executor.adapters.declaration import ModelDeclaration


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    return block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]


DECLARATION = ModelDeclaration(
    transformer_class="FluxTransformer2DModel",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    streams=("hidden_states", "encoder_hidden_states"),
    returns=("encoder_hidden_states", "hidden_states"),
    conditioning=("encoder_hidden_states", "pooled_projections"),
    modulated_input=modulated_input,
    tea_coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    between_blocks=("controlnet_block_samples", "controlnet_single_block_samples"),
    layer_counts=("num_layers", "num_single_layers"),
    self_attention=("attn",),
    per_image=(
        *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "temb"),
        *("ip_adapter_image_embeds", "ip_hidden_states"),
    ),
    per_token=("image_rotary_emb",),
    guidance="calls",
    packs=2,
    text_first=True,
    thresholds=thresholds.FLUX,
)
