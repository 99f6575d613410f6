"""What is remembered of evaluated blocks, per conditioning branch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.blocks.plan import Span
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice


@dataclass(eq=False)
class Reference:
    """One evaluation of one unit (a block, or a stack of blocks that is remembered as a whole).

    Inputs and outputs are kept as they came, without a copy; consecutive blocks share tensors. A residual over a run
    of units is their difference, computed when something first stands in for that run.
    """

    step: int
    inputs: Streams
    outputs: Streams
    residuals: dict[int, Streams] = field(default_factory=dict)

    def residual_to(self, last: Reference, length: int) -> Streams:
        """outputs of ``last`` − inputs of this reference: the residual of the run of ``length`` units between them."""
        if length not in self.residuals:
            self.residuals[length] = tuple(b - a for a, b in zip(self.inputs, last.outputs, strict=True))
        return self.residuals[length]

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.inputs
        yield from self.outputs
        for streams in self.residuals.values():
            yield from streams


class BlockHistory:
    """References of all units of one branch, newest first, and the stand-ins built from them."""

    def __init__(self, units: int, length: int) -> None:
        self.references: list[deque[Reference]] = [deque(maxlen=length) for _ in range(units)]

    def store(self, unit: int, step: int, inputs: Streams, outputs: Streams) -> None:
        self.references[unit].appendleft(Reference(step, _detached(inputs), _detached(outputs)))

    def store_some(
        self,
        unit: int,
        step: int,
        tokens: TokenChoice,
        inputs: Streams,
        standing: Streams,
        fresh: Streams,
        extrapolated: bool,
    ) -> None:
        """Remember an evaluation of some image tokens and all text.

        The other tokens keep the input of their own last evaluation, so that their drift goes on adding up. Their
        residual is the one that stood in where that lies on the line that is extrapolated on, else the one they had.
        """
        newest = self.references[unit][0]
        kept = standing[0] - inputs[0] if extrapolated else newest.outputs[0] - newest.inputs[0]
        before = tokens.put(newest.inputs[0], tokens.take(inputs[0]))
        after = tokens.put(newest.inputs[0] + kept, fresh[0])
        self.store(unit, step, (before, *inputs[1:]), (after, *fresh[1:]))

    def clear(self) -> None:
        for history in self.references:
            history.clear()

    def nodes(self, unit: int) -> tuple[int, ...]:
        """Steps of the remembered evaluations, newest first."""
        return tuple(reference.step for reference in self.references[unit])

    def usable(self, unit: int) -> bool:
        return bool(self.references[unit])

    def linked(self, unit: int) -> bool:
        """Whether the next unit was always evaluated at the same steps, on this unit's own outputs."""
        ours, theirs = self.references[unit], self.references[unit + 1]
        return len(ours) == len(theirs) and all(
            a.step == b.step and all(x is y for x, y in zip(a.outputs, b.inputs, strict=True))
            for a, b in zip(ours, theirs, strict=True)
        )

    def predict(
        self,
        span: Span,
        inputs: Streams,
        coefficients: tuple[float, ...],
        take: Callable[[Streams], Streams] | None = None,
    ) -> Streams:
        """Return inputs + Σ_j coefficients_j × residual_j of a span, or of several that are linked.

        ``take`` picks from remembered streams the part that ``inputs`` are of.
        """
        first, last = span.first, min(span.last, len(self.references) - 1)
        outputs = inputs
        for weight, start, end in zip(coefficients, self.references[first], self.references[last], strict=False):
            if weight == 0:
                continue
            residual = start.residual_to(end, last + 1 - first)
            if take is not None:
                residual = take(residual)
            outputs = tuple(torch.add(x, r, alpha=weight) for x, r in zip(outputs, residual, strict=True))
        return outputs

    def activation(self, unit: int) -> Streams:
        return self.references[unit][0].outputs

    def count_unusable(self, device: torch.device, others: Iterable[torch.Tensor] = ()) -> torch.Tensor:
        """How many remembered tensors, ``others`` among them, hold a NaN or an infinity, a scalar on the device.

        Everything remembered is read again at every step: a stand-in must never bring what a step ago was already
        broken, nor what has been broken since.
        """
        sums = [tensor.sum(dtype=torch.float32).to(device) for tensor in self._tensors(others)]
        if not sums:
            return torch.zeros((), device=device)
        return (~torch.isfinite(torch.stack(sums))).sum().float()

    def bytes(self, others: Iterable[torch.Tensor] = ()) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors(others))

    def _tensors(self, others: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Each remembered tensor once, ``others`` among them: neighbours share theirs."""
        own = (tensor for history in self.references for each in history for tensor in each.tensors())
        return list({id(tensor): tensor for tensor in (*own, *others)}.values())


@dataclass
class ModuleHistory:
    """What modules of one branch gave at their last evaluation, by their place."""

    outputs: dict[int, Any] = field(default_factory=dict)

    def tensors(self) -> Iterator[torch.Tensor]:
        """List all that is remembered."""
        for output in self.outputs.values():
            yield from tensors_of(output)


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """List the tensors that a module gave: one, or several in a tuple."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from tensors_of(each)


def _detached(streams: Streams) -> Streams:
    return tuple(tensor.detach() if tensor.requires_grad else tensor for tensor in streams)
