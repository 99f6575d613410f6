"""DiT (arXiv 2212.09748): one stream, one list of blocks, timestep and label embedded in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xfuser.config import thresholds
from xfuser.model_executor.adapters.declaration import KnownModel, ModelDeclaration


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    hidden_states = arguments["hidden_states"]
    return block.norm1(
        hidden_states, arguments["timestep"], arguments["class_labels"], hidden_dtype=hidden_states.dtype
    )[0]


TINY_DIT = KnownModel(thresholds.TINY_DIT_CONFIGURATION, thresholds.TINY_DIT)

DECLARATION = ModelDeclaration(
    transformer_class="DiTTransformer2DModel",
    block_lists=("transformer_blocks",),
    streams=("hidden_states",),
    returns=("hidden_states",),
    conditioning=("class_labels",),
    modulated_input=modulated_input,
    self_attention=("attn1",),
    per_image=("hidden_states", "timestep", "class_labels"),
    tail_needs=("norm1.emb",),
    thresholds=thresholds.DIT,
    known_models=(TINY_DIT,),
)
