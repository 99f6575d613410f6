"""No cache: every block, every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.cache.policies.base import Policy, no_signal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xfuser.model_executor.adapters import Streams
    from xfuser.model_executor.cache.steps import Call


class FullPolicy(Policy):
    """Proposes to evaluate everything."""

    def measure(
        self, state: Any, block: nn.Module, arguments: Mapping[str, Any], inputs: Streams, outputs: Streams | None
    ) -> torch.Tensor:
        return no_signal(inputs)

    def propose(self, state: Any, sums: list[float], call: Call) -> bool:
        return True
