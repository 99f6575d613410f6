"""AdaCache (arXiv 2411.02397): how fast one residual changes says how many steps until the next evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from xfuser.config.settings import choice, count, number
from xfuser.model_executor.cache.policies.base import Policy, attentions_of, relative_sums

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xfuser.config import CacheConfig
    from xfuser.model_executor.adapters import Streams
    from xfuser.model_executor.cache.steps import Call

# The published codebooks: below each limit of the metric, the steps from one evaluation to the next; and beyond all.
CODEBOOKS: dict[str, tuple[tuple[tuple[float, int], ...], int]] = {
    "fast": (((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2)), 1),
    "slow": (((0.08, 3), (0.16, 2)), 1),
    "long": (((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4)), 3),
}
LAST_STEPS = 2  # always evaluated
GRADIENT = 10.0  # how much a change of the motion counts beside the motion itself
SUMS = 4  # Σ|p − p_ref|, Σ|p_ref|; Σ|p of a frame − p of the frame before|, Σ|p|


@dataclass
class AdaState:
    """``pieces`` are the watched residual of the evaluation at ``step``, ``before`` that of the one before it; ``told``
    says whether the two were compared. ``seen`` is the step of the newest evaluation that sums have told of, ``due``
    that of the next one, ``rate`` the steps that the codebook had last, and ``motion`` the newest motion score.
    """

    pieces: list[torch.Tensor] = field(default_factory=list)
    before: list[torch.Tensor] = field(default_factory=list)
    step: int = -1
    told: bool = True
    seen: int = 0
    due: int = 0
    rate: int = 1
    motion: float | None = None
    proposed: int = -1


class AdaPolicy(Policy):
    """Evaluates, then not again for as many steps as the codebook has for the metric's value: one rate for all blocks.

    The metric is c = ‖p_t − p_{t+k}‖₁ / ‖p_{t+k}‖₁ / k, where p is what the attention of the middle block adds (before
    its gate), and k the steps between two evaluations. For video (``ada_frames``) it is regularised by motion:
    c·(m + |10 (m − m_prev)/k|), m the relative L1 difference of p between neighbouring frames. The first step and the
    last two are always evaluated; so is the second, since two evaluations are needed for a first value.
    """

    @dataclass(frozen=True)
    class Config:
        ada_codebook: str = choice(
            "fast", CODEBOOKS, "which published table of limits and steps: fast and slow are for 30 steps, long for 100"
        )
        ada_scale: float = number(1.0, "multiplies the limits of the table; more reuses more, 0 reuses least")
        ada_frames: int | None = count(
            None, "of a video, the latent frames: regularise by the motion between them", otherwise="no video"
        )

    watches_modules: ClassVar[bool] = True
    signals: ClassVar[int] = SUMS
    sweep: ClassVar[tuple[str, tuple[float, ...]]] = ("ada_scale", (0.25, 0.5, 1.0, 2.0, 4.0))
    needs_num_steps: ClassVar[tuple[str, ...]] = ("AdaCache computes the last two steps",)

    @classmethod
    def refused_where_shared(cls, config: CacheConfig) -> str | None:
        return None if config.ada_frames is None else "ada_frames compares frames that lie on several ranks"

    def new_state(self) -> AdaState:
        return AdaState()

    def modules(self, index: int, block: nn.Module) -> Sequence[str]:
        """Name the attention of the middle block."""
        if index != self.blocks // 2:
            return ()
        names = attentions_of(self.spec, block)
        if not names:
            raise TypeError(
                f"use_cache='Ada' looks at the middle block's attention, and a {type(block).__name__} has none"
            )
        return names[:1]

    def observe_module(
        self, state: AdaState, block: int, name: str, inputs: torch.Tensor, outputs: Any, call: Call
    ) -> None:
        residual = outputs[0] if isinstance(outputs, tuple) else outputs
        if call.step != state.step:
            state.before, state.pieces, state.step, state.told = state.pieces, [], call.step, False
        state.pieces.append(residual.detach())

    def measure(
        self,
        state: AdaState,
        block: nn.Module,
        arguments: Mapping[str, Any],
        inputs: Streams,
        outputs: Streams | None,
    ) -> torch.Tensor:
        import torch

        sums = torch.zeros(SUMS, device=inputs[0].device)
        if state.told or len(state.before) != len(state.pieces):
            return sums
        state.told = True
        for now, before in zip(state.pieces, state.before, strict=True):
            now, before = (self._of_image(each, inputs[0].shape[1]) for each in (now, before))
            sums = sums + torch.cat((relative_sums(now, before), self._motion_sums(now)))
        return sums

    def propose(self, state: AdaState, sums: list[float], call: Call) -> bool:
        self._learn(state, sums, call.step - 1)
        state.proposed = call.step
        if call.num_steps is not None and call.step >= call.num_steps - LAST_STEPS:
            return True
        return call.step >= state.due

    def commit(self, state: AdaState, evaluated: bool) -> None:
        if evaluated:
            state.due = state.proposed + state.rate

    def _learn(self, state: AdaState, sums: list[float], step: int) -> None:
        """Take in the sums of an evaluation at ``step``: zeros where there was none, or nothing to compare it with."""
        change, scale, frames, size = sums
        if not scale > 0 or not math.isfinite(sum(sums)):
            return
        lag = max(step - state.seen, 1)
        metric = change / scale / lag
        if self.config.ada_frames is not None and size > 0:
            motion = frames / size
            gradient = 0.0 if state.motion is None else (motion - state.motion) / lag
            metric *= motion + abs(GRADIENT * gradient)
            state.motion = motion
        state.seen, state.rate = step, self.steps_until(metric)
        state.due = step + state.rate

    def steps_until(self, metric: float) -> int:
        """Look up how many steps after an evaluation with this metric the next one is due."""
        table, beyond = CODEBOOKS[self.config.ada_codebook]
        return next((steps for limit, steps in table if metric < limit * self.config.ada_scale), beyond)

    def _of_image(self, residual: torch.Tensor, tokens: int) -> torch.Tensor:
        """The image's tokens of a residual, which may have the text's too: those are the same on all ranks."""
        return residual[:, -tokens:] if self.spec.text_first else residual[:, :tokens]

    def _motion_sums(self, residual: torch.Tensor) -> torch.Tensor:
        """Σ|p of a frame − p of the frame before it| and Σ|p|, shape [2]; zeros without frames.

        Raises:
            ValueError: The tokens are no whole number of frames.
        """
        import torch

        frames = self.config.ada_frames
        if frames is None:
            return torch.zeros(2, device=residual.device)
        images, tokens, channels = residual.shape
        if tokens % frames:
            raise ValueError(f"ada_frames={frames}: there are {tokens} tokens, which are no whole number of frames")
        by_frame = residual.view(images, frames, -1, channels)
        return torch.stack(((by_frame[:, 1:] - by_frame[:, :-1]).abs().sum(), residual.abs().sum())).float()
