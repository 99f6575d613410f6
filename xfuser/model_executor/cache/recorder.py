"""Watches whole generations and keeps what a calibration is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.calibration import RUNS, Calibration, fit_polynomial
from xfuser.model_executor.cache.linear import FULL_CHANNELS, solve_ridge
from xfuser.model_executor.cache.steps import BranchKey

MEMORY_BYTES = 512 << 20  # of samples, a branch
TOKENS = (16, 1024)  # sampled per block and step, at least and at most
LAGS = (1, 2, 3)  # steps between the evaluations that a linear map is fitted on
SETTLED = 3  # steps left out of the linear maps: the first ones are always evaluated


@dataclass
class BranchRecord:
    """Samples of one branch of one generation: per step and block, every stream's input and output [n, D].

    ``signals`` pairs the relative changes, from step to step, of the first block's modulated input and of the last
    block's output; ``change`` is the first of the step that runs.
    """

    steps: list[dict[int, list[tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=list)
    modulated: torch.Tensor | None = None
    final: torch.Tensor | None = None
    change: float | None = None
    signals: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Recorder:
    """Adds up, over generations, the Gram matrices of the residuals and the sums that maps and signals are fitted from.

    Every generation must evaluate everything and have the same number of steps.
    """

    blocks: int
    expected_steps: int
    generations: int = 0
    _branches: dict[BranchKey, BranchRecord] = field(default_factory=dict)
    _gram: torch.Tensor | None = None
    _square: torch.Tensor | None = None
    _changes: dict[int, list[float]] = field(default_factory=dict)
    _signals: list[tuple[float, float]] = field(default_factory=list)
    _normal: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def signal(self, branch: BranchKey, modulated: torch.Tensor) -> None:
        """A step opens: the first block's modulated input."""
        record = self._branches.setdefault(branch, BranchRecord())
        record.steps.append({})
        previous, record.modulated = record.modulated, modulated.detach()
        record.change = _relative_l1(record.modulated, previous)

    def collect(self, branch: BranchKey, block: int, inputs: Streams, outputs: Streams) -> None:
        """One block's evaluation."""
        record = self._branches[branch]
        sampled = [(self._sample(before), self._sample(after)) for before, after in zip(inputs, outputs, strict=True)]
        record.steps[-1][block] = sampled
        if block == self.blocks - 1:
            previous, record.final = record.final, outputs[0].detach()
            change = _relative_l1(record.final, previous)
            if record.change is not None and change is not None:
                record.signals.append((record.change, change))

    def finish_generation(self) -> bool:
        """Take the generation in; ``False`` where it was not whole, which leaves everything as it was."""
        branches = list(self._branches.values())
        self._branches.clear()
        whole = [
            each
            for each in branches
            if len(each.steps) == self.expected_steps and all(len(step) == self.blocks for step in each.steps)
        ]
        for record in whole:
            self._add(record)
        self.generations += bool(whole)
        return bool(whole)

    def calibration(self, provenance: dict[str, Any]) -> Calibration:
        """What was recorded so far.

        Raises:
            ValueError: No whole generation was seen.
        """
        if self._gram is None or self._square is None:
            raise ValueError("no whole generation was recorded; generate at least one image")
        return Calibration(
            self._gram,
            self._square,
            tuple(sum(self._changes[block]) / len(self._changes[block]) for block in range(self.blocks)),
            fit_polynomial(self._signals),
            {key: solve_ridge(*sums).cpu() for key, sums in self._normal.items()},
            provenance,
        )

    def _sample(self, stream: torch.Tensor) -> torch.Tensor:
        tokens = stream.detach().flatten(0, 1)
        affordable = MEMORY_BYTES // (2 * self.blocks * self.expected_steps * tokens.shape[1] * 4)
        count = min(max(affordable, TOKENS[0]), TOKENS[1])
        return tokens[:: max(1, len(tokens) // count)].float()

    def _add(self, record: BranchRecord) -> None:
        rows = [(block, block) for block in range(self.blocks)]
        rows += [
            (first, _end_of_run(record.steps[0], first))
            for first in (min(each, self.blocks - 1) for each in range(RUNS))
        ]
        grams, squares = [], []
        for first, last in rows:
            residuals = torch.stack([(step[last][0][1] - step[first][0][0]).flatten() for step in record.steps])
            grams.append((residuals @ residuals.T).double().cpu())
            squares.append(torch.stack([step[last][0][1].square().sum() for step in record.steps]).double().cpu())
        gram, square = torch.stack(grams), torch.stack(squares)
        self._gram = gram if self._gram is None else self._gram + gram
        self._square = square if self._square is None else self._square + square
        self._signals += record.signals
        for block in range(self.blocks):
            self._add_changes(record, block)

    def _add_changes(self, record: BranchRecord, block: int) -> None:
        for now in range(1, len(record.steps)):
            current, before = record.steps[now][block], record.steps[now - 1][block]
            change = (current[0][0] - before[0][0]).square().sum() / before[0][0].square().sum()
            self._changes.setdefault(block, []).append(float(change))
            for lag in LAGS:
                if now - lag >= SETTLED:
                    self._add_pair(block, record.steps[now - lag][block], current)

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


def _end_of_run(step: dict[int, list[tuple[torch.Tensor, torch.Tensor]]], first: int) -> int:
    """The last block whose output has the shape of this one's input: the last of all, but for some UNets."""
    shape = step[first][0][0].shape
    return max(block for block, streams in step.items() if block >= first and streams[0][1].shape == shape)


def _relative_l1(current: torch.Tensor, previous: torch.Tensor | None) -> float | None:
    if previous is None or previous.shape != current.shape:
        return None
    return float((current - previous).abs().sum() / previous.abs().sum())
