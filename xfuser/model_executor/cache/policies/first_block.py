"""First Block Cache: block 0 always runs, and its residual's change stands for the others'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xfuser.model_executor.cache.policies.base import Policy, relative_l1, relative_sums

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xfuser.model_executor.adapters import Streams
    from xfuser.model_executor.cache.steps import Call


@dataclass
class FirstBlockState:
    current: torch.Tensor | None = None
    computed: torch.Tensor | None = None


class FirstBlockPolicy(Policy):
    """Evaluates when the rel-L1 of block 0's residual, against that of the last computed step, is ≥ rel_l1_thresh."""

    common_threshold: ClassVar[float | None] = 0.05
    signals: ClassVar[int] = 2
    probe_blocks: ClassVar[int] = 1

    def new_state(self) -> FirstBlockState:
        return FirstBlockState()

    def measure(
        self,
        state: FirstBlockState,
        block: nn.Module,
        arguments: Mapping[str, Any],
        inputs: Streams,
        outputs: Streams | None,
    ) -> torch.Tensor:
        assert outputs is not None
        state.current = outputs[0] - inputs[0]
        return relative_sums(state.current, state.computed)

    def propose(self, state: FirstBlockState, sums: list[float], call: Call) -> bool:
        return not relative_l1(sums) < self.config.rel_l1_thresh

    def commit(self, state: FirstBlockState, evaluated: bool) -> None:
        if evaluated:
            state.computed = state.current
        state.current = None
