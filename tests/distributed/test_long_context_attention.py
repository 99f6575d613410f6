"""xDiT's attention over tokens that ranks share is attention over all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from test_upstream_groups import placed
from torch.nn.functional import scaled_dot_product_attention

from xfuser.core.distributed import get_sequence_parallel_rank, get_sequence_parallel_world_size
from xfuser.core.long_ctx_attention import xFuserLongContextAttention

DEGREES = {
    "ulysses": {"ulysses_degree": 4},
    "ring": {"ring_degree": 4},
    "both": {"ulysses_degree": 2, "ring_degree": 2},
}


def tensors(seed: int, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, 4, 8, generator=generator) for _ in range(3)]


def whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
    heads = [each.transpose(1, 2) for each in (query, key, value)]
    return scaled_dot_product_attention(*heads, **settings).transpose(1, 2)


def difference(degrees: dict[str, int], strategy: str, settings: dict[str, Any]) -> float:
    """How far this rank's output is from its part of attention over all tokens."""
    with placed(**degrees):
        attention = xFuserLongContextAttention(**settings)
        assert dist.get_world_size(attention.ulysses_pg) == degrees.get("ulysses_degree", 1)
        assert dist.get_world_size(attention.ring_pg) == degrees.get("ring_degree", 1)
        ranks, rank = get_sequence_parallel_world_size(), get_sequence_parallel_rank()
        images, joint = tensors(0, 12), tensors(1, 5)
        mine = [each.chunk(ranks, dim=1)[rank] for each in images]
        if strategy == "none":
            expected = whole(*images, scale=0.3).chunk(ranks, dim=1)[rank]
            return (attention(None, *mine, softmax_scale=0.3) - expected).abs().max().item()
        beside = dict(zip(("joint_tensor_query", "joint_tensor_key", "joint_tensor_value"), joint, strict=True))
        output = attention(None, *mine, joint_strategy=strategy, **beside)
        everything = whole(*(torch.cat(pair, dim=1) for pair in zip(images, joint, strict=True)))
        parts = [everything[:, :12].chunk(ranks, dim=1)[rank], everything[:, 12:]]
        return (output - torch.cat(parts[::-1] if strategy == "front" else parts, dim=1)).abs().max().item()


@pytest.mark.parametrize("strategy", ["none", "front", "rear"])
@pytest.mark.parametrize("kind", DEGREES)
def test_every_rank_has_its_part(four: Pool, kind: str, strategy: str) -> None:
    for settings in ({}, {"use_pack_qkv": True}):
        assert max(four.call(difference, DEGREES[kind], strategy, settings)) < 1e-5
