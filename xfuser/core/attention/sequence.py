"""Attention over tokens that several ranks share: Ulysses, ring, and their product."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from yunchang import LongContextAttention
from yunchang.globals import HAS_FLASH_ATTN, PROCESS_GROUP
from yunchang.kernels import AttnType

from xfuser.core.distributed.clock import Clock
from xfuser.core.distributed.mesh import ParallelMesh

# Subtracted from the scores of padding before the softmax: far below real ones, and no infinity in half precision.
MASKED = 30000.0
ALIGNMENT = 8  # head channels that flash attention wants a multiple of


def torch_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, S, H, d] by torch's own kernels: output and log-sum-exp [B, H, S] in float32.

    yunchang 0.6.4's own CPU path returns zeros for the log-sum-exp, and rounds it to the inputs' precision elsewhere;
    a ring adds up its parts by it.
    """
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    aten = torch.ops.aten
    if query.device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
    else:
        kernel = aten._scaled_dot_product_flash_attention
    output, sums = kernel(query, key, value, dropout_p, causal, scale=softmax_scale)[:2]
    return output.transpose(1, 2), sums.float()


class SequenceAttention:
    """Attention of a rank's own queries over the keys and values of all ranks of its sequence group.

    yunchang's LongContextAttention exchanges tokens for heads within the ulysses group and passes keys and values
    round the ring. It wants equal shards: shorter ones are padded, and a further head channel takes the padding's
    scores to where the softmax is zero, which needs no mask and so works with every kernel.

    With flash-attn yunchang calls the kernel itself, so that the clock books it as attention exchange too.
    """

    def __init__(self, mesh: ParallelMesh, clock: Clock) -> None:
        PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = mesh.group("ulysses"), mesh.group("ring")
        flash = HAS_FLASH_ATTN and mesh.device.type != "cpu"
        # A kind that yunchang does not know makes it call the processor instead of a kernel of its own.
        kind: Any = AttnType.FA if flash else "torch"
        self._attention = LongContextAttention(attn_type=kind, attn_processor=None if flash else self._kernel)
        self._clock = clock

    def _kernel(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with self._clock("compute"):
            return torch_kernel(*args, **kwargs)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        padded: tuple[int, int] | None,
    ) -> torch.Tensor:
        """Attend; all tensors are [B, heads, S, d].

        Args:
            query: Of this rank's tokens; ``key`` and ``value`` as well.
            key: See there.
            value: See there.
            scale: Of the scores; by default 1/√d.
            padded: Lengths of queries and keys that all ranks bring, where they do not have equally many.
        """
        length, channels = query.shape[2], query.shape[3]
        scale = channels**-0.5 if scale is None else scale
        if padded is not None:
            query, key, value = _masked(query, key, value, *padded)
        query, key, value = (each.transpose(1, 2).contiguous() for each in (query, key, value))
        with self._clock("attention exchange"):
            output = self._attention(query, key, value, softmax_scale=scale)
        return output.transpose(1, 2)[:, :, :length, :channels]


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded to these lengths, and in channels, one of which tells padding from keys."""
    length, channels = key.shape[2], query.shape[3]
    further = ALIGNMENT - channels % ALIGNMENT
    query = pad(query, (0, further, 0, queries - query.shape[2]))
    key = pad(key, (0, further, 0, keys - length))
    value = pad(value, (0, further, 0, keys - length))
    query[..., channels] = 1
    key[:, :, length:, channels] = -MASKED
    return query, key, value
