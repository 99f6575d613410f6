"""FastCache (arXiv 2505.20353): skip blocks whose input's change is noise, and evaluate only the tokens that move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from statistics import fmean, pvariance
from typing import TYPE_CHECKING, Any, ClassVar

from xfuser.config.settings import number, switch
from xfuser.model_executor.cache.policies.base import Learning, Policy, Section

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xfuser.model_executor.adapters import Streams
    from xfuser.model_executor.cache.blocks.token_choice import TokenChoice
    from xfuser.model_executor.cache.calibration.recorder import Samples
    from xfuser.model_executor.cache.steps import BranchKey, Call

WARMUP_STEPS = 3
LAYER_SUMS = 3  # Σ‖H_t − H_{t−k}‖² / k², Σ‖H_{t−k}‖², elements; k steps since it was last seen
# The published adaptive threshold β₀ + β₁·var + β₂·t + β₃·t², t from 0 to 1.
ADAPTIVE = (0.01, 0.5, -0.002, 5e-5)


@dataclass
class LayerState:
    """What is known of one block: its last input and when that was, and the changes δ² seen so far."""

    inputs: torch.Tensor | None = None
    step: int = -1
    elements: float = 1.0
    sums: torch.Tensor | None = None
    changes: list[float] = field(default_factory=list)
    warmup: list[float] = field(default_factory=list)


@dataclass
class FastState:
    layers: dict[int, LayerState] = field(default_factory=dict)
    first_inputs: torch.Tensor | None = None
    tokens: TokenChoice | None = None

    def layer(self, block: int) -> LayerState:
        return self.layers.setdefault(block, LayerState())


class FastSection(Section):
    """Measures the noise σ²: per block, the mean squared relative change of its input from step to step."""

    def __init__(self, learning: Learning) -> None:
        super().__init__(learning)
        self._changes: dict[int, list[float]] = {}

    def ends(self, branches: Mapping[BranchKey, Samples]) -> None:
        for steps in branches.values():
            for block in range(len(self.learning.blocks)):
                for before, now in pairwise(steps):
                    (old, _), (new, _) = before[block][0], now[block][0]
                    change = (new - old).square().sum() / old.square().sum()
                    self._changes.setdefault(block, []).append(float(change))

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        means = [sum(changes) / len(changes) for _, changes in sorted(self._changes.items())]
        return {"noise": torch.tensor(means, dtype=torch.float64)}


class FastPolicy(Policy):
    """Skips block l when its input's relative change δ_l is within noise, δ² ≤ σ_l²·χ²_{ND,1−α}/(ND), and below
    rel_l1_thresh.

    As published the test has no σ_l² and then always passes (the quantile divided by ND is about 1), so the noise
    variance σ_l² is the calibration's mean δ_l², or that of the first steps, which are all evaluated. The sums are
    those of the step before (``sync="step"``) or the current ones. With a motion threshold, evaluated blocks see the
    tokens whose squared change since the last step is at least that share of the image's largest.
    """

    @dataclass(frozen=True)
    class Config:
        motion_threshold: float | None = number(
            None,
            "evaluate only tokens whose squared change is at least this share of the largest, 0 or more",
            otherwise="all tokens",
        )
        significance: float = number(0.05, "α of the χ² test, 0 to 1; 0 switches the test off", 0, 1)
        adaptive_threshold: bool = switch(False, "bound the drift by the published adaptive threshold too")

    Section: ClassVar[type[Section] | None] = FastSection
    common_threshold: ClassVar[float | None] = 0.05
    approximation: ClassVar[str] = "linear"
    reads_calibration: ClassVar[bool] = True
    observes_blocks: ClassVar[bool] = True

    def new_state(self) -> FastState:
        return FastState()

    def observe(self, state: FastState, block: int, inputs: torch.Tensor, step: int) -> None:
        """Take in a block's input [B, P, D], whether or not the block runs."""
        import torch

        layer = state.layer(block)
        if layer.inputs is not None and layer.inputs.shape == inputs.shape:
            change = _square(inputs - layer.inputs) / (step - layer.step) ** 2
            elements = torch.full_like(change, inputs.numel())
            layer.sums = torch.stack((change, _square(layer.inputs), elements))
        layer.inputs, layer.step = inputs.detach(), step

    def measure(
        self,
        state: FastState,
        block: nn.Module,
        arguments: Mapping[str, Any],
        inputs: Streams,
        outputs: Streams | None,
    ) -> torch.Tensor:
        import torch

        from xfuser.model_executor.cache.blocks.token_choice import TokenChoice

        if self.config.motion_threshold:
            text = sum(stream.shape[1] for stream in inputs[1:])
            state.tokens = TokenChoice.moving(inputs[0], state.first_inputs, self.config.motion_threshold, text)
            state.first_inputs = inputs[0].detach()
        nothing = torch.zeros(LAYER_SUMS, device=inputs[0].device)
        told = []
        for index in range(self.blocks):
            layer = state.layer(index)
            told.append(nothing if layer.sums is None else layer.sums)
            layer.sums = None
        return torch.cat(told)

    def propose_blocks(self, state: FastState, sums: list[float], call: Call) -> tuple[float, ...]:
        return tuple(
            self.propose_block(state, index, sums[index * LAYER_SUMS : (index + 1) * LAYER_SUMS], call)
            for index in range(self.blocks)
        )

    def layer_sums(self, state: FastState, block: int, device: torch.device) -> torch.Tensor:
        """The current step's sums of one block, for ``sync="layer"``."""
        import torch

        layer = state.layer(block)
        sums, layer.sums = layer.sums, None
        return torch.zeros(LAYER_SUMS, device=device) if sums is None else sums

    def propose_block(self, state: FastState, block: int, sums: list[float], call: Call) -> float:
        """The share of tokens to evaluate in this block, from its sums over all ranks; 0 skips it."""
        layer = state.layer(block)
        change, scale, elements = sums
        if not math.isfinite(change + scale):
            return 1.0
        if scale > 0:
            layer.elements = elements
            layer.changes.append(change / scale)
            # The sums of a step are judged in the next one, or at once.
            if call.step < WARMUP_STEPS + (self.config.sync == "step"):
                layer.warmup.append(layer.changes[-1])
        if call.step < WARMUP_STEPS or not layer.changes:
            return 1.0
        if self._is_noise(layer, block, call):
            return 0.0
        return 1.0 if state.tokens is None else state.tokens.share

    def choose_tokens(self, state: FastState, call: Call) -> TokenChoice | None:
        return None if call.step < WARMUP_STEPS else state.tokens

    def _is_noise(self, layer: LayerState, block: int, call: Call) -> bool:
        square = layer.changes[-1]
        learned = self.learned
        noise = fmean(layer.warmup or layer.changes) if learned is None else float(learned["noise"][block])
        limit = self.config.rel_l1_thresh
        if self.config.adaptive_threshold:
            limit = min(limit, _adaptive(layer.changes, call))
        return math.sqrt(square) < limit and square <= noise * _quantile(int(layer.elements), self.config.significance)


def _adaptive(changes: list[float], call: Call) -> float:
    """The published threshold with the variance of the block's δ so far; without a step count t stays 0."""
    time = call.step / call.num_steps if call.num_steps else 0.0
    constant, variance, linear, square = ADAPTIVE
    spread = pvariance([math.sqrt(change) for change in changes])
    return constant + variance * spread + linear * time + square * time**2


@cache
def _quantile(elements: int, significance: float) -> float:
    """χ²_{n,1−α} / n, without unit; about 1 for a hidden state's worth of elements."""
    from scipy.stats import chi2

    return float(chi2.ppf(1 - significance, max(elements, 1))) / max(elements, 1)


def _square(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    # Token by token first: see `base._absolute_sum`.
    return torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32).square().sum(dtype=torch.float64).float()
