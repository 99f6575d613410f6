"""Counts the multiplications and additions of a call by watching the operators that run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one call of the transformer.

    Attributes:
        blocks: Of each block.
        total: Of the whole transformer, as it is without a cache.
        signal: What the base method's signal costs on top.
        modules: Of each module within blocks that a method watches.
    """

    blocks: tuple[float, ...]
    total: float
    signal: float
    modules: tuple[float, ...] = ()


class FlopCount(TorchDispatchMode):
    """Adds up the FLOPs of matrix products and attention while it is entered; everything else counts as free.

    torch's own FlopCounterMode hooks every module of the process while it counts, which two pipelines in two threads
    cannot share; the formulas are the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=output)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            query, key, value = args[:3]
            self.total += sdpa_flop_count(query.shape, key.shape, value.shape)
        return output


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Shapes of all tensors that the transformer is called with."""
    named = [*enumerate(args), *sorted(kwargs.items())]
    return tuple((name, tuple(value.shape)) for name, value in named if isinstance(value, torch.Tensor))
