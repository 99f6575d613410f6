"""PixArt alpha and Sigma (arXiv 2310.00426, 2403.04692): one stream that looks at the text through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xfuser.config import thresholds
from xfuser.model_executor.adapters.declaration import ModelDeclaration


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    # The timestep comes embedded once for all blocks; a table of each block's own tells them apart. The first two of
    # its six rows belong to the first norm.
    hidden_states = arguments["hidden_states"]
    rows = block.scale_shift_table + arguments["timestep"].reshape(len(hidden_states), 6, -1)
    return block.norm1(hidden_states) * (1 + rows[:, 1:2]) + rows[:, 0:1]


DECLARATION = ModelDeclaration(
    transformer_class="PixArtTransformer2DModel",
    block_lists=("transformer_blocks",),
    streams=("hidden_states",),
    returns=("hidden_states",),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    modulated_input=modulated_input,
    self_attention=("attn1",),
    per_image=(
        *("hidden_states", "timestep", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"),
        *("resolution", "aspect_ratio"),
    ),
    thresholds=thresholds.PIXART,
)
