"""FastCache's linear maps (arXiv 2505.20353), anchored at the last evaluation and fitted, never random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.blocks.history import Reference
from xfuser.model_executor.cache.policies.base import Learning, Section
from xfuser.model_executor.cache.steps import BranchKey

if TYPE_CHECKING:
    from xfuser.model_executor.cache.calibration.recorder import Samples

# Above this many channels a full map costs more memory than it is worth: one slope a channel is fitted instead.
FULL_CHANNELS = 1024
FITTED_TOKENS = 2048  # per pair of evaluations, block and stream
MEMORY = 0.7  # share of the older pairs
RIDGE = 0.3  # of the mean square of the input's change; draws the map towards plain reuse
LAGS = (1, 2, 3)  # steps between the evaluations that a recorded map is fitted on
SETTLED = 3  # steps left out of it: the first ones are always evaluated


class LinearSection(Section):
    """Fits the maps of all blocks and streams on recorded generations: tensors ``<block>.<stream>``."""

    def __init__(self, learning: Learning) -> None:
        super().__init__(learning)
        self._normal: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def ends(self, branches: Mapping[BranchKey, Samples]) -> None:
        for steps in branches.values():
            for block in range(len(self.learning.blocks)):
                for now in range(SETTLED, len(steps)):
                    for lag in LAGS:
                        if now - lag >= SETTLED:
                            self._add_pair(block, steps[now - lag][block], steps[now][block])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{block}.{stream}": solve_ridge(*sums).cpu() for (block, stream), sums in self._normal.items()}

    def _add_pair(
        self,
        block: int,
        older: list[tuple[torch.Tensor, torch.Tensor]],
        newer: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        for stream, ((old_in, old_out), (new_in, new_out)) in enumerate(zip(older, newer, strict=True)):
            change = new_in - old_in
            moved = new_out - old_out - change
            full = change.shape[1] <= FULL_CHANNELS
            sums = (
                change.T @ change if full else change.square().sum(0),
                change.T @ moved if full else (change * moved).sum(0),
            )
            known = self._normal.get((block, stream))
            self._normal[block, stream] = sums if known is None else (known[0] + sums[0], known[1] + sums[1])


def maps_in(section: Mapping[str, torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
    """Read the maps of a calibration's section by block and stream."""
    keys = {name: name.split(".") for name in section}
    return {(int(keys[name][0]), int(keys[name][1])): matrix for name, matrix in section.items()}


@dataclass
class LinearMap:
    """One block's and stream's map A of the input's change to the residual's, and the sums that it is fitted from.

    r_t ≈ r_ref + (h_t − h_ref) A, so H_l = H_{l−1} W + b with W = I + A and, per token, b = r_ref − h_ref A. With the
    paper's one b for all tokens the map has to explain the block from its input alone: on tiny-dit that errs by 17% of
    the output where reusing the residual errs by 1%.
    """

    square: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    matrix: torch.Tensor | None = None

    def learn(
        self, inputs: torch.Tensor, residuals: torch.Tensor, reduce: Callable[[torch.Tensor], None] | None = None
    ) -> None:
        """Take in changes [n, D] of inputs and residuals between two evaluations (closed form, ridge); ``reduce`` adds
        up the sums over the ranks that share them.
        """
        full = inputs.shape[1] <= FULL_CHANNELS
        square = inputs.T @ inputs if full else inputs.square().sum(0)
        cross = inputs.T @ residuals if full else (inputs * residuals).sum(0)
        if reduce is not None:
            both = torch.stack((square, cross))
            reduce(both)
            square, cross = both
        if self.square is None or self.cross is None:
            self.square, self.cross = square, cross
        else:
            self.square, self.cross = MEMORY * self.square + square, MEMORY * self.cross + cross
        self.matrix = None

    def add_to(self, outputs: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The outputs [..., D], which are overwritten, plus the residual's expected change for the input's change."""
        if self.matrix is None:
            if self.square is None or self.cross is None:
                return outputs
            self.matrix = solve_ridge(self.square, self.cross)
        matrix = self.matrix = self.matrix.to(change.device, change.dtype)
        if matrix.dim() == 1:
            return outputs.addcmul_(change, matrix)
        return outputs.flatten(0, -2).addmm_(change.flatten(0, -2), matrix).view(outputs.shape)


def solve_ridge(square: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """(XᵀX + ridge)⁻¹ XᵀY, or channel by channel; zeros where nothing has moved."""
    if square.dim() == 1:
        return cross / (square + RIDGE * square.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    ridge = RIDGE * square.diagonal().mean()
    if not ridge > 0:
        return torch.zeros_like(cross)
    return torch.linalg.solve(square + ridge * torch.eye(len(square), device=square.device), cross)


@dataclass
class LinearMaps:
    """The maps of all blocks and streams; calibrated ones are used as they are.

    ``pairs`` holds, for every block that was evaluated twice since its map was last applied, what went in and came out
    at the two newest evaluations, by stream. They enter the sums when the map is next applied: most evaluations are
    followed by another one, whose pair says more of what comes next.

    Where several ``ranks`` share the tokens of a block, ``reduce`` adds up their sums in place, so that all have the
    map that one process would fit.
    """

    calibrated: bool = False
    ranks: int = 1
    reduce: Callable[[torch.Tensor], None] | None = None
    maps: dict[tuple[int, int], LinearMap] = field(default_factory=dict)
    pairs: dict[int, list[tuple[torch.Tensor, ...]]] = field(default_factory=dict)

    def learn(self, block: int, older: Reference, newer: Reference) -> None:
        """Take note of two evaluations of one block, in one generation."""
        if not self.calibrated:
            self.pairs[block] = list(zip(older.inputs, newer.inputs, older.outputs, newer.outputs, strict=True))

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is still to be learned from."""
        for pair in self.pairs.values():
            for tensors in pair:
                yield from tensors

    def predict(
        self,
        block: int,
        inputs: Streams,
        reference: Reference,
        take: Callable[[Streams], Streams] | None = None,
    ) -> Streams:
        """What the block would give: its last residual, plus the map of what its input has changed since.

        ``take`` picks from remembered streams the part that ``inputs`` are of.
        """
        self._fit(block)
        residual, known = reference.residual_to(reference, 1), reference.inputs
        if take is not None:
            residual, known = take(residual), take(known)
        return tuple(
            self._of_stream(block, stream, now, before, kept)
            for stream, (now, before, kept) in enumerate(zip(inputs, known, residual, strict=True))
        )

    def _fit(self, block: int) -> None:
        for stream, tensors in enumerate(self.pairs.pop(block, ())):
            tokens = tensors[0].shape[0] * tensors[0].shape[1] * self.ranks
            pick = slice(None, None, max(1, tokens // FITTED_TOKENS))
            before, after, left, right = (each.flatten(0, 1)[pick].float() for each in tensors)
            change = after - before
            self.maps.setdefault((block, stream), LinearMap()).learn(change, right - left - change, self.reduce)

    def _of_stream(
        self, block: int, stream: int, now: torch.Tensor, before: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        fitted = self.maps.get((block, stream))
        # In this order the sum has the residual's layout. DiT's first input is a transposed view, which every product
        # and norm from there on would be slower with.
        outputs = kept + now
        return outputs if fitted is None else fitted.add_to(outputs, now - before)
