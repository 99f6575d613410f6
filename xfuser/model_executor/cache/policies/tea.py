"""TeaCache (arXiv 2411.19108): the modulated input's change, rescaled and accumulated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from xfuser.model_executor.cache.policies.base import Learning, Policy, Section, relative_l1, relative_sums

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xfuser.model_executor.adapters import Streams
    from xfuser.model_executor.cache.calibration.recorder import Samples
    from xfuser.model_executor.cache.steps import BranchKey, Call

IDENTITY = (1.0, 0.0)


@dataclass
class TeaState:
    modulated: torch.Tensor | None = None
    accumulated: float = 0.0


@dataclass
class BranchChanges:
    """One branch of the generation that runs: relative changes, from step to step, of the first block's modulated input
    and of the last block's output, as pairs; ``change`` is the first of the step that runs.
    """

    modulated: torch.Tensor | None = None
    final: torch.Tensor | None = None
    change: float | None = None
    pairs: list[tuple[float, float]] = field(default_factory=list)


class TeaSection(Section):
    """Fits the polynomial (TeaCache, section 3.3) from the signal's change to the output's."""

    def __init__(self, learning: Learning) -> None:
        super().__init__(learning)
        self._branches: dict[BranchKey, BranchChanges] = {}
        self._pairs: list[tuple[float, float]] = []

    def opens(self, branch: BranchKey, block: nn.Module, arguments: Mapping[str, Any]) -> None:
        record = self._branches.setdefault(branch, BranchChanges())
        previous, record.modulated = record.modulated, self.learning.spec.modulated_input(block, arguments)
        record.modulated = record.modulated.detach()
        record.change = _relative_change(record.modulated, previous)

    def sees(self, branch: BranchKey, block: int, inputs: Streams, outputs: Streams) -> None:
        if block < len(self.learning.blocks) - 1:
            return
        record = self._branches[branch]
        previous, record.final = record.final, outputs[0].detach()
        change = _relative_change(record.final, previous)
        if record.change is not None and change is not None:
            record.pairs.append((record.change, change))

    def ends(self, branches: Mapping[BranchKey, Samples]) -> None:
        for branch in branches:
            self._pairs += self._branches[branch].pairs
        self._branches.clear()

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        return {"polynomial": torch.tensor(fit_polynomial(self._pairs), dtype=torch.float64)}


class TeaPolicy(Policy):
    """Evaluates when Σ poly(rel-L1 of the first block's modulated input against the step before) ≥ rel_l1_thresh.

    The first and the last step always compute. A negative value of the polynomial counts as 0, so that a threshold of 0
    never hits. The polynomial is the calibration's, else the family's published one (TeaCache, section 3.3), or the
    identity where none is published.
    """

    Section: ClassVar[type[Section] | None] = TeaSection
    common_threshold: ClassVar[float | None] = 0.05
    reads_calibration: ClassVar[bool] = True
    signals: ClassVar[int] = 2
    needs_num_steps: ClassVar[tuple[str, ...]] = ("TeaCache computes the last step",)

    def new_state(self) -> TeaState:
        return TeaState()

    @property
    def coefficients(self) -> tuple[float, ...]:
        if self.learned is not None:
            return tuple(self.learned["polynomial"].tolist())
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


def fit_polynomial(changes: Sequence[tuple[float, float]], degree: int = 4) -> tuple[float, ...]:
    """Fit TeaCache's rescaling (arXiv 2411.19108, section 3.3) from the signal's change to the output's.

    Returns:
        Its coefficients, highest degree first.
    """
    import numpy as np

    points = np.array([point for point in changes if all(math.isfinite(value) for value in point)])
    if len(points) < 2 or points[:, 0].max() <= 0:
        return IDENTITY
    scale = float(points[:, 0].max())
    fitted = np.polyfit(points[:, 0] / scale, points[:, 1], min(degree, max(1, len(points) // 4)))
    powers = np.arange(len(fitted))[::-1]
    return tuple(float(value) for value in fitted / scale**powers)


def _relative_change(current: torch.Tensor, previous: torch.Tensor | None) -> float | None:
    if previous is None or previous.shape != current.shape:
        return None
    return float((current - previous).abs().sum() / previous.abs().sum())
