"""xDiT's attention over tokens that several ranks share, for scripts that spread a transformer by themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from yunchang.comm.all_to_all import SeqAllToAll4D
from yunchang.globals import HAS_FLASH_ATTN
from yunchang.hybrid.utils import RING_IMPL_DICT
from yunchang.kernels import AttnType

from xfuser.core.attention.sequence import torch_kernel
from xfuser.xdit.parallel_state import get_sp_group

_STRATEGIES = ("front", "rear")
_RINGS = ("basic", "zigzag", "strip")
# The kinds of yunchang that stand for torch's own kernels, by any of its versions' names.
_TORCH = [kind for kind in AttnType if kind.name.startswith("TORCH")]


class xFuserLongContextAttention(nn.Module):  # noqa: N801 (xDiT's name)
    """Attention of a rank's own queries over all keys and values of its sequence group, by yunchang's exchanges.

    The ulysses group exchanges tokens for heads, the ring passes keys and values round; both are those of the degrees
    in force when it is made.

    Args:
        scatter_idx: The dimension of the heads.
        gather_idx: The dimension of the tokens.
        ring_impl_type: yunchang's kind of ring, "basic", "zigzag" or "strip"; joint tensors need "basic".
        use_pack_qkv: Exchange queries, keys and values in one message.
        use_kv_cache: Not supported: PipeFusion remembers keys and values itself.
        use_sync: Wait for each exchange.
        attn_type: yunchang's kernel; by default flash-attn where it is installed and the device has it, else torch's.
        attn_processor: A kernel of the caller's own, in yunchang's form.

    Raises:
        RuntimeError: This process has no degrees yet.
        ValueError: An argument is not supported.
    """

    def __init__(
        self,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_pack_qkv: bool = False,
        use_kv_cache: bool = False,
        use_sync: bool = False,
        attn_type: AttnType | None = None,
        attn_processor: Any = None,
    ) -> None:
        super().__init__()
        if use_kv_cache:
            raise ValueError("use_kv_cache is not supported: xfuser.parallelize(pipeline, mesh) runs PipeFusion")
        if ring_impl_type not in _RINGS:
            raise ValueError(f"ring_impl_type={ring_impl_type!r} is not supported; choose one of {', '.join(_RINGS)}")
        self._group = get_sp_group()
        self.use_pack_qkv, self.use_sync = use_pack_qkv, use_sync
        self.scatter_idx, self.gather_idx, self.ring_impl_type = scatter_idx, gather_idx, ring_impl_type
        flash = HAS_FLASH_ATTN and self._group.device.type != "cpu"
        kind: Any = attn_type
        if attn_processor is None and (attn_type in _TORCH or (attn_type is None and not flash)):
            # yunchang's own torch kernel gives zeros for the log-sum-exp, by which a ring adds up its parts; a kind
            # that it does not know makes it call the processor.
            kind, attn_processor = "torch", torch_kernel
        elif attn_type is None:
            kind = AttnType.FA if attn_processor is None else "own"
        self._kind, self._kernel = kind, attn_processor
        self._ring = None if self.ring_pg is None else RING_IMPL_DICT[ring_impl_type]
        if self._ring is None and self._kernel is None:
            raise ValueError(f"attn_type={attn_type} needs processes that torchrun has started; leave it out")

    @property
    def ulysses_pg(self) -> dist.ProcessGroup | None:
        """torch's group of the ranks that exchange tokens for heads."""
        return self._group.ulysses_group

    @property
    def ring_pg(self) -> dist.ProcessGroup | None:
        """torch's group of the ranks that pass keys and values round."""
        return self._group.ring_group

    def forward(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        joint_tensor_query: torch.Tensor | None = None,
        joint_tensor_key: torch.Tensor | None = None,
        joint_tensor_value: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        joint_strategy: str = "none",
    ) -> torch.Tensor:
        """Attend.

        Args:
            attn: The module that asks; not needed, and may be ``None``.
            query: [B, S, H, d], of this rank's tokens; all ranks bring equally many.
            key: As the query.
            value: As the query.
            joint_tensor_query: [B, J, H, d], of tokens that every rank holds alike.
            joint_tensor_key: As that.
            joint_tensor_value: As that.
            dropout_p: Share of the weights that are dropped.
            softmax_scale: Of the scores; by default 1/√d.
            causal: Whether a token attends only to those before it.
            window_size: Not supported but for (-1, -1), without a kernel that has it.
            alibi_slopes: As that.
            deterministic: For the kernel's backward pass.
            return_attn_probs: Not supported.
            joint_strategy: Whether the joint tokens come in "front" of this rank's own or to the "rear".

        Returns:
            [B, S, H, d]; with joint tokens [B, S + J, H, d], in the order that the strategy names.

        Raises:
            ValueError: Arguments that contradict each other or are not supported.
        """
        joint = (joint_tensor_query, joint_tensor_key, joint_tensor_value)
        self._check(joint, joint_strategy, causal, window_size, alibi_slopes, return_attn_probs)
        if joint_tensor_query is not None:
            ordered = [joint_tensor_query, query] if joint_strategy == "front" else [query, joint_tensor_query]
            query = torch.cat(ordered, dim=1)
        query, key, value = self._exchange(query, key, value)
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        settings = {"dropout_p": dropout_p, "softmax_scale": scale, "causal": causal}
        output, sums = self._attend(
            *(query, key, value),
            **settings,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
            deterministic=deterministic,
        )
        if joint_tensor_key is not None and joint_tensor_value is not None:
            beside = torch_kernel(query, self._heads(joint_tensor_key), self._heads(joint_tensor_value), **settings)
            output = _merged(output, sums, *beside)
        if self.ulysses_pg is None:
            return output
        return SeqAllToAll4D.apply(self.ulysses_pg, output, self.gather_idx, self.scatter_idx, self.use_sync)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, S, H, d] and log-sum-exp [B, H, S] over the keys of the whole ring."""
        if self._ring is None:
            return self._kernel(query, key, value, **settings)[:2]
        settings |= {"return_attn_probs": True, "attn_type": self._kind, "attn_processor": self._kernel}
        return self._ring(query, key, value, group=self.ring_pg, **settings)[:2]

    def _exchange(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All tokens of the ulysses group, with this rank's share of the heads."""
        if self.ulysses_pg is None:
            return query, key, value

        def swap(tensor: torch.Tensor) -> torch.Tensor:
            return SeqAllToAll4D.apply(self.ulysses_pg, tensor, self.scatter_idx, self.gather_idx, self.use_sync)

        if self.use_pack_qkv and query.shape == key.shape:
            packed = swap(torch.cat([query, key, value]).contiguous()).chunk(3)
            return packed[0], packed[1], packed[2]
        return swap(query.contiguous()), swap(key.contiguous()), swap(value.contiguous())

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's share of the heads of what every rank holds."""
        if self.ulysses_pg is None:
            return tensor
        return tensor.chunk(dist.get_world_size(self.ulysses_pg), dim=2)[dist.get_rank(self.ulysses_pg)]

    def _check(
        self,
        joint: tuple[torch.Tensor | None, ...],
        strategy: str,
        causal: bool,
        window_size: tuple[int, int],
        alibi_slopes: torch.Tensor | None,
        return_attn_probs: bool,
    ) -> None:
        given = [each is not None for each in joint]
        if any(given) and not all(given):
            raise ValueError("joint_tensor_query, joint_tensor_key and joint_tensor_value are given together or not")
        if all(given) and strategy not in _STRATEGIES:
            raise ValueError(f"joint_strategy={strategy!r} is not known; choose one of {', '.join(_STRATEGIES)}")
        if all(given) and (causal or self.ring_impl_type != "basic"):
            raise ValueError('joint tensors go with ring_impl_type="basic" and without causal; leave one of them out')
        if self._kernel is torch_kernel and (tuple(window_size) != (-1, -1) or alibi_slopes is not None):
            raise ValueError("torch's kernel has no window_size and no alibi_slopes; leave them out")
        if return_attn_probs:
            raise ValueError("return_attn_probs is not supported: no rank holds all of them; leave it out")


def _merged(
    output: torch.Tensor, sums: torch.Tensor, further: torch.Tensor, further_sums: torch.Tensor
) -> torch.Tensor:
    """Attention over two sets of keys from that over each, [B, S, H, d], by their log-sum-exps [B, H, S]."""
    share = torch.sigmoid(further_sums.float() - sums.float()).transpose(1, 2).unsqueeze(-1)
    return (output.float() + share * (further.float() - output.float())).to(output.dtype)
