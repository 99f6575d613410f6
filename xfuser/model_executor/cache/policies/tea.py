"""TeaCache (arXiv 2411.19108): the modulated input's change, rescaled and accumulated."""

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

IDENTITY = (1.0, 0.0)


@dataclass
class TeaState:
    modulated: torch.Tensor | None = None
    accumulated: float = 0.0


class TeaPolicy(Policy):
    """Evaluates when Σ poly(rel-L1 of the first block's modulated input against the step before) ≥ rel_l1_thresh.

    The first and the last step always compute. A negative value of the polynomial counts as 0, so that a threshold of 0
    never hits. The polynomial is the calibration's, else the family's published one (TeaCache, section 3.3), or the
    identity where none is published.
    """

    common_threshold: ClassVar[float | None] = 0.05
    reads_calibration: ClassVar[bool] = True
    signals: ClassVar[int] = 2
    needs_num_steps: ClassVar[tuple[str, ...]] = ("TeaCache computes the last step",)

    def new_state(self) -> TeaState:
        return TeaState()

    @property
    def coefficients(self) -> tuple[float, ...]:
        if self.calibration is not None:
            return self.calibration.tea
        return self.spec.tea_coefficients or IDENTITY

    def measure(
        self,
        state: TeaState,
        block: nn.Module,
        arguments: Mapping[str, Any],
        inputs: Streams,
        outputs: Streams | None,
    ) -> torch.Tensor:
        modulated = self.spec.modulated_input(block, arguments)
        sums = relative_sums(modulated, state.modulated)
        state.modulated = modulated
        return sums

    def propose(self, state: TeaState, sums: list[float], call: Call) -> bool:
        change = relative_l1(sums)
        if change == float("inf"):
            return True
        rescaled = 0.0
        for coefficient in self.coefficients:
            rescaled = rescaled * change + coefficient
        state.accumulated += max(rescaled, 0.0)
        return call.is_last or not state.accumulated < self.config.rel_l1_thresh

    def commit(self, state: TeaState, evaluated: bool) -> None:
        if evaluated:
            state.accumulated = 0.0
