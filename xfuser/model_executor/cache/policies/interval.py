"""Every N-th step: no signal at all, the schedule of FORA and TaylorSeer (arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from xfuser.config.settings import count
from xfuser.model_executor.cache.policies.base import Policy, no_signal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xfuser.model_executor.adapters import Streams
    from xfuser.model_executor.cache.steps import Call

WARMUP_STEPS = 3


class IntervalPolicy(Policy):
    """Evaluates the first WARMUP_STEPS steps, then every ``interval``-th one, and the last."""

    @dataclass(frozen=True)
    class Config:
        interval: int = count(3, "evaluate every N-th step")

    by_step_number: ClassVar[bool] = True
    sweep: ClassVar[tuple[str, tuple[float, ...]]] = ("interval", (2, 3, 4, 6, 8))
    needs_num_steps: ClassVar[tuple[str, ...]] = ("the last step is whole",)

    def measure(
        self, state: Any, block: nn.Module, arguments: Mapping[str, Any], inputs: Streams, outputs: Streams | None
    ) -> torch.Tensor:
        return no_signal(inputs)

    def propose(self, state: Any, sums: list[float], call: Call) -> bool:
        since = call.step - (WARMUP_STEPS - 1)
        return since < 0 or call.is_last or since % self.config.interval == 0
