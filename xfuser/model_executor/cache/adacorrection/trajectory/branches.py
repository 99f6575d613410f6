"""The denoiser's calls within a step: what each returned lately, and what it would return now.

Guidance comes as two halves of one batch, or as two calls. Either way there are two branches, whose newest outputs are
remembered apart; a step that evaluates nothing, or the conditional branch alone, is answered with straight lines
through the newest two, so the pipeline's own guidance formula goes on working on them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from xfuser.model_executor.cache.adacorrection.trajectory.plan import NODES

HALF_TOLERANCE = 1e-3  # of the output's RMS: another batch size may pick other kernels, another image is far off


def sample_of(output: Any) -> torch.Tensor:
    """Find the tensor in what a denoiser returns."""
    sample = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    if not isinstance(sample, torch.Tensor):
        raise TypeError(f"the denoiser returned {type(output).__name__}; a cache needs a tensor, or one named sample")
    return sample


def with_sample(output: Any, sample: torch.Tensor) -> Any:
    """Make what a denoiser returns, with another tensor in it."""
    if isinstance(output, torch.Tensor):
        return sample
    if isinstance(output, (tuple, list)):
        return type(output)((sample, *output[1:]))
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, sample=sample)
    output.sample = sample
    return output


@dataclass
class Branch:
    """The newest outputs of one branch, newest first, each with its step."""

    outputs: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def remember(self, step: int, output: torch.Tensor) -> None:
        self.outputs.insert(0, (step, output))
        del self.outputs[NODES:]

    def forecast(self, step: int) -> torch.Tensor:
        """Draw the straight line through the newest two outputs, or repeat the only one."""
        (newest, output), *older = self.outputs
        if not older or newest == step:
            return output
        (before, previous), *_ = older
        return output + (output - previous) * ((step - newest) / (newest - before))

    def bytes(self) -> int:
        return sum(output.numel() * output.element_size() for _, output in self.outputs)


@dataclass
class Slot:
    """One call of a denoiser within every step.

    Attributes:
        halves: Whether the two branches of guidance come in this call's batch.
        branches: One, or the batch's two halves in their order.
        shell: What was returned last, less its tensor: what a skipped call returns has the same form.
        forms: Of the arguments that are known to be answered in the form of what is remembered.
    """

    halves: bool = False
    branches: list[Branch] = field(default_factory=list)
    shell: Any = None
    forms: set[Any] = field(default_factory=set)

    def remember(self, step: int, output: Any) -> None:
        sample = sample_of(output)
        parts = sample.chunk(2) if self.halves else (sample,)
        if not self.branches:
            self.branches = [Branch() for _ in parts]
        for branch, part in zip(self.branches, parts, strict=True):
            branch.remember(step, part)
        self.shell = _without_sample(output)

    def fits(self, output: Any) -> bool:
        """Whether an output has the form of what is remembered."""
        if not self.branches:
            return True
        parts = sample_of(output).chunk(2) if self.halves else (sample_of(output),)
        held = [branch.outputs[0][1].shape for branch in self.branches]
        return [part.shape for part in parts] == held

    def forecast(self, step: int) -> Any:
        """Answer a call without the denoiser."""
        parts = [branch.forecast(step) for branch in self.branches]
        return with_sample(self.shell, parts[0] if len(parts) == 1 else torch.cat(parts))

    def split(self) -> None:
        """Take a batch that has been remembered whole for two branches."""
        (whole,) = self.branches
        self.halves = True
        self.branches = [Branch(), Branch()]
        for step, output in reversed(whole.outputs):
            for branch, part in zip(self.branches, output.chunk(2), strict=True):
                branch.remember(step, part)

    def bytes(self) -> int:
        return sum(branch.bytes() for branch in self.branches)


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Name the form of a call: the shape of its first tensor, or of the first of several with their number."""
    for value in (*args, *kwargs.values()):
        several = value if isinstance(value, (list, tuple)) else [value]
        if several and isinstance(several[0], torch.Tensor) and several[0].ndim:
            return (len(several), *several[0].shape)
    return None


def _without_sample(output: Any) -> Any:
    empty = torch.empty(0)
    if isinstance(output, torch.Tensor):
        return empty
    return with_sample(output, empty) if not hasattr(output, "sample") or dataclasses.is_dataclass(output) else output


class HalfBatch:
    """Evaluates one half of a batch that holds both branches of guidance.

    Which arguments list the batch is found on a real call: those whose first dimension has its length are halved, and
    the result is compared with the same half of the whole call's. Where it differs, one of them is something else (a
    table of as many tokens, say) and is left whole; where nothing agrees, branches are not evaluated apart.
    """

    def __init__(self) -> None:
        self.names: frozenset[Any] | None = None
        self.checked = False
        self.seconds = 0.0
        # What counts the denoiser's calls is not to see the trial ones.
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def check(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: torch.Tensor,
        half: int,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        """Find the arguments that list the batch; ``names`` and ``seconds`` tell which, and what it took."""
        self.checked = True
        synchronize = synchronize or (lambda: None)
        batch = whole.shape[0]
        candidates = _listing(args, kwargs, batch)
        expected = whole.chunk(2)[half]
        for names in [candidates, *(candidates - {name} for name in sorted(candidates, key=str))]:
            if not names:
                continue
            begin = time.perf_counter()
            try:
                with self.around():
                    got = sample_of(call(*narrowed(args, names, half, batch), **narrowed(kwargs, names, half, batch)))
            except (RuntimeError, ValueError, IndexError):
                continue  # not a valid call: one of these arguments does not list the batch
            if got.shape == expected.shape and _alike(got, expected):
                synchronize()
                self.names, self.seconds = frozenset(names), time.perf_counter() - begin
                return

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], half: int) -> Any:
        """Evaluate one half."""
        assert self.names is not None
        batch = _batch(args, kwargs, self.names)
        return call(*narrowed(args, self.names, half, batch), **narrowed(kwargs, self.names, half, batch))


def _leaves(name: Any, value: Any) -> list[tuple[Any, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, dict):
        return [leaf for key, each in value.items() for leaf in _leaves((name, key), each)]
    if isinstance(value, (tuple, list)):
        return [leaf for key, each in enumerate(value) for leaf in _leaves((name, key), each)]
    return []


def _listing(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> set[Any]:
    named = [leaf for key, value in [*enumerate(args), *kwargs.items()] for leaf in _leaves(key, value)]
    return {name for name, tensor in named if tensor.ndim and tensor.shape[0] == batch}


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any], names: frozenset[Any]) -> int:
    named = [leaf for key, value in [*enumerate(args), *kwargs.items()] for leaf in _leaves(key, value)]
    return next(tensor.shape[0] for name, tensor in named if name in names)


def narrowed(values: Any, names: frozenset[Any] | set[Any], half: int, batch: int) -> Any:
    """Halve the named tensors in positional or keyword arguments."""

    def narrow(name: Any, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.narrow(0, half * (batch // 2), batch // 2) if name in names else value
        if isinstance(value, dict):
            return {key: narrow((name, key), each) for key, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(narrow((name, key), each) for key, each in enumerate(value))
        return value

    if isinstance(values, dict):
        return {key: narrow(key, value) for key, value in values.items()}
    return tuple(narrow(key, value) for key, value in enumerate(values))


def _alike(got: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = expected.float().square().mean().sqrt().clamp_min(1e-12)
    tolerance = max(HALF_TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
    return bool(((got.float() - expected.float()).square().mean().sqrt() / scale) < tolerance)
