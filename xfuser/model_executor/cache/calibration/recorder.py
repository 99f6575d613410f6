"""Watches whole generations and keeps what a calibration is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.calibration.store import RUNS, Calibration
from xfuser.model_executor.cache.policies.base import Section
from xfuser.model_executor.cache.steps import BranchKey

MEMORY_BYTES = 512 << 20  # of samples, a branch
TOKENS = (16, 1024)  # sampled per block and step, at least and at most

# Of one branch: per step and block, every stream's input and output [n, D].
Samples = list[dict[int, list[tuple[torch.Tensor, torch.Tensor]]]]


@dataclass
class Recorder:
    """Adds up, over generations, the Gram matrices of the residuals, and lets the sections see what they learn from.

    Every generation must evaluate everything and have the same number of steps.
    """

    blocks: int
    expected_steps: int
    sections: Mapping[str, Section]
    generations: int = 0
    _branches: dict[BranchKey, Samples] = field(default_factory=dict)
    _gram: torch.Tensor | None = None
    _square: torch.Tensor | None = None

    def called(self, branch: BranchKey, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The transformer is called for one step of a branch."""
        for section in self.sections.values():
            section.called(branch, args, kwargs)

    def opens(self, branch: BranchKey, block: nn.Module, arguments: Mapping[str, Any]) -> None:
        """A step begins with the first block, called with these arguments."""
        self._branches.setdefault(branch, []).append({})
        for section in self.sections.values():
            section.opens(branch, block, arguments)

    def collect(self, branch: BranchKey, block: int, inputs: Streams, outputs: Streams) -> None:
        """One block's evaluation."""
        sampled = [(self._sample(before), self._sample(after)) for before, after in zip(inputs, outputs, strict=True)]
        self._branches[branch][-1][block] = sampled
        for section in self.sections.values():
            section.sees(branch, block, inputs, outputs)

    def sees_module(self, branch: BranchKey, block: int, name: str, inputs: torch.Tensor, outputs: Any) -> None:
        """One evaluation of a module within a block."""
        for section in self.sections.values():
            section.sees_module(branch, block, name, inputs, outputs)

    def finish_generation(self) -> bool:
        """Take the generation in; ``False`` where it was not whole, which leaves everything as it was."""
        whole = {
            branch: steps
            for branch, steps in self._branches.items()
            if len(steps) == self.expected_steps and all(len(step) == self.blocks for step in steps)
        }
        self._branches.clear()
        for steps in whole.values():
            self._add(steps)
        for section in self.sections.values():
            section.ends(whole)
        self.generations += bool(whole)
        return bool(whole)

    def calibration(self, provenance: dict[str, Any]) -> Calibration:
        """What was recorded so far.

        Raises:
            ValueError: No whole generation was seen.
        """
        if self._gram is None or self._square is None:
            raise ValueError("no whole generation was recorded; generate at least one image")
        learned = {name: section.tensors() for name, section in self.sections.items()}
        learned = {name: tensors for name, tensors in learned.items() if tensors}
        return Calibration(self._gram, self._square, learned, provenance)

    def _sample(self, stream: torch.Tensor) -> torch.Tensor:
        tokens = stream.detach().flatten(0, 1)
        affordable = MEMORY_BYTES // (2 * self.blocks * self.expected_steps * tokens.shape[1] * 4)
        count = min(max(affordable, TOKENS[0]), TOKENS[1])
        return tokens[:: max(1, len(tokens) // count)].float()

    def _add(self, steps: Samples) -> None:
        rows = [(block, block) for block in range(self.blocks)]
        rows += [
            (first, _end_of_run(steps[0], first)) for first in (min(each, self.blocks - 1) for each in range(RUNS))
        ]
        grams, squares = [], []
        for first, last in rows:
            residuals = torch.stack([(step[last][0][1] - step[first][0][0]).flatten() for step in steps])
            grams.append((residuals @ residuals.T).double().cpu())
            squares.append(torch.stack([step[last][0][1].square().sum() for step in steps]).double().cpu())
        gram, square = torch.stack(grams), torch.stack(squares)
        self._gram = gram if self._gram is None else self._gram + gram
        self._square = square if self._square is None else self._square + square


def _end_of_run(step: dict[int, list[tuple[torch.Tensor, torch.Tensor]]], first: int) -> int:
    """The last block whose output has the shape of this one's input: the last of all, but for some UNets."""
    shape = step[first][0][0].shape
    return max(block for block, streams in step.items() if block >= first and streams[0][1].shape == shape)
