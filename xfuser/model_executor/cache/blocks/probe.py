"""What evaluated blocks show, taken from a sample of their tokens, all blocks of a step at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from xfuser.core.tokens import Extent
from xfuser.model_executor.cache.adacorrection.offset import offset_sums
from xfuser.model_executor.cache.approximation import Extrapolation

# Enough tokens to see drift and error, at a small fraction of the blocks' memory traffic.
TOKENS = 24
# Streams that wait to be sampled together, since small operations between large ones find every cache cold. More of
# them would hold more activations in memory.
WAITING = 4


@cache
def _sampled_places(extent: Extent, images: int, tokens: int, device: torch.device) -> torch.Tensor:
    """The stride is odd, so that images whose token count is a power of two do not show the same few places."""
    whole = torch.arange(0, extent.images * extent.tokens, extent.images * extent.tokens // TOKENS | 1)
    image = whole.div(extent.tokens, rounding_mode="floor") - extent.first_image
    token = whole % extent.tokens - extent.first_token
    here = (image >= 0) & (image < images) & (token >= 0) & (token < tokens)
    return (image * tokens + token)[here].to(device)


def sample_tokens(stream: torch.Tensor, extent: Extent | None = None) -> torch.Tensor:
    """Evenly spaced tokens of all images [images, tokens, D], those of them that are in this rank's part [B, P, D],
    copied as float32 [n, D]; about 24 over all ranks.
    """
    images, tokens, _ = stream.shape
    places = _sampled_places(extent or Extent.whole(stream), images, tokens, stream.device)
    return stream.detach().flatten(0, 1).index_select(0, places).float()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Samples of several rows at one step, each of shape [R, 1, p, D]."""

    step: int
    inputs: torch.Tensor
    residuals: torch.Tensor


@dataclass
class Measured:
    """Sums of one step, shape [R, 8], the rows they belong to, and per row the stand-in's remainder and order, and the
    steps since the row's last evaluation (0 without one).
    """

    sums: torch.Tensor
    rows: list[int]
    notes: list[tuple[float, int]]
    lags: list[int]


@dataclass
class TokenProbe:
    """One branch's samples: those of the step that runs, and the remembered ones of the steps before.

    A row is a block, or the run of all blocks behind the probed ones. ``extent`` says where this rank's part of an
    activation lies in the whole; by default it is the whole.
    """

    approximation: Extrapolation
    extent: Callable[[torch.Tensor], Extent] = Extent.whole
    _open: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _elsewhere: set[int] = field(default_factory=set)
    _waiting: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _history: dict[int, deque[tuple[Evaluation, int]]] = field(default_factory=dict)
    _latest: tuple[torch.Tensor, torch.Tensor] | None = None

    def collect(self, row: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take the samples of one evaluation, soon. A block's output is the next one's input, and is sampled once."""
        self._waiting.append((row, inputs, outputs))
        if len(self._waiting) >= WAITING:
            self._sample_waiting()

    def note(self, row: int, like: torch.Tensor) -> None:
        """A row was evaluated on other ranks only: its sums here are zero, and its steps are known all the same."""
        self._sample_waiting()
        nothing = torch.zeros_like(self._sample(like))
        self._open.append((row, nothing, nothing))
        self._elsewhere.add(row)

    def sample(self, stream: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sampled tokens, shape [1, n, D]."""
        return sample_tokens(stream, self.extent(stream))[None]

    def discard(self) -> None:
        """Forget everything."""
        self.abandon()
        self._history.clear()

    def abandon(self) -> None:
        """Forget what was collected in this step."""
        self._waiting.clear()
        self._open.clear()
        self._elsewhere.clear()
        self._latest = None

    def last_step(self, row: int) -> int | None:
        """The step of the row's newest remembered evaluation."""
        history = self._history.get(row)
        return history[0][0].step if history else None

    def last_inputs(self, row: int) -> torch.Tensor | None:
        """The sample of the row's input at that step, shape [1, p, D]."""
        history = self._history.get(row)
        return history[0][0].inputs[history[0][1]] if history else None

    def close(self, step: int) -> Measured | None:
        """The sums of all that was collected in this step, which then becomes the newest remembered evaluation."""
        self._sample_waiting()
        if not self._open:
            return None
        rows, inputs, outputs = zip(*self._open, strict=True)
        here = [row not in self._elsewhere for row in rows]
        self.abandon()
        if any(self._shape_changed(row, each) for row, each in zip(rows, inputs, strict=True)):
            self._history.clear()
        measured = Measured(torch.zeros(0), list(rows), [], [])
        parts = []
        for first, last in _stretches([each.shape for each in inputs]):
            alike = slice(first, last)
            stacked = torch.stack(inputs[alike])[:, None], torch.stack(outputs[alike])[:, None]
            parts += self._close_alike(step, rows[alike], *stacked, measured)
        measured.sums = torch.cat(parts)
        if not all(here):
            measured.sums = measured.sums * measured.sums.new_tensor(here)[:, None]
        return measured

    def _close_alike(
        self, step: int, rows: Sequence[int], inputs: torch.Tensor, outputs: torch.Tensor, measured: Measured
    ) -> list[torch.Tensor]:
        """The sums of rows whose samples [R, 1, p, D] have one shape; notes and lags are added to ``measured``."""
        parts = []
        for first, last in self._groups(rows):
            entries = [self._history.get(row, ()) for row in rows[first:last]]
            nodes = tuple(evaluation.step for evaluation, _ in entries[0])
            history = [_gather([entry[age] for entry in entries]) for age in range(len(nodes))]
            pairs = [self.approximation.pair(row, step, nodes) for row in rows[first:last]]
            lower, full = (inputs.new_tensor(each)[..., None, None, None] for each in zip(*pairs, strict=True))
            parts.append(offset_sums(inputs[first:last], outputs[first:last], history, lower, full))
            measured.notes += [self.approximation.expectation(row, step, nodes) for row in rows[first:last]]
            measured.lags += [step - nodes[0] if nodes else 0] * (last - first)
        evaluation = Evaluation(step, inputs, outputs - inputs)
        for index, row in enumerate(rows):
            self._history.setdefault(row, deque(maxlen=self.approximation.order + 1)).appendleft((evaluation, index))
        return parts

    def _sample_waiting(self) -> None:
        for row, inputs, outputs in self._waiting:
            self._open.append((row, self._sample(inputs), self._sample(outputs)))
        self._waiting.clear()

    def _sample(self, stream: torch.Tensor) -> torch.Tensor:
        if self._latest is None or self._latest[0] is not stream:
            self._latest = (stream, sample_tokens(stream, self.extent(stream)))
        return self._latest[1]

    def _shape_changed(self, row: int, inputs: torch.Tensor) -> bool:
        known = self.last_inputs(row)
        return known is not None and known.shape[-2:] != inputs.shape

    def _groups(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Stretches of rows that were last evaluated at the same steps."""
        return _stretches([[evaluation.step for evaluation, _ in self._history.get(row, ())] for row in rows])


def _stretches(values: Sequence[Any]) -> list[tuple[int, int]]:
    """First and one past the last index of every stretch of equal values."""
    starts = [0, *(index for index in range(1, len(values)) if values[index] != values[index - 1]), len(values)]
    return list(zip(starts[:-1], starts[1:], strict=True))


def _gather(entries: list[tuple[Evaluation, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and residuals of one remembered evaluation of several rows, without a copy where they lie together."""
    evaluation, first = entries[0]
    if all(each is evaluation and index == first + place for place, (each, index) in enumerate(entries)):
        together = slice(first, first + len(entries))
        return evaluation.inputs[together], evaluation.residuals[together]
    return (
        torch.stack([each.inputs[index] for each, index in entries]),
        torch.stack([each.residuals[index] for each, index in entries]),
    )
