"""Which generation, which step, which branch: what one call of the transformer is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger(__name__)

BranchKey = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One call of the transformer.

    Attributes:
        step: Index of the denoising step within its generation, from 0.
        branch: Names the conditioning branch; calls of one branch share remembered activations.
        starts_generation: Nothing remembered from before may be used.
        num_steps: Steps of this generation, ``None`` where nobody knows.
    """

    step: int
    branch: BranchKey
    starts_generation: bool
    num_steps: int | None

    @property
    def is_last(self) -> bool:
        return self.num_steps is not None and self.step >= self.num_steps - 1


@dataclass
class _Step:
    """The calls seen so far within one step."""

    timestep: float | None = None
    sample: torch.Tensor | None = None
    names: list[Any] = field(default_factory=list)
    shapes: set[tuple[int, ...]] = field(default_factory=set)


class StepTracker:
    """Tells steps, branches and generations apart.

    With a scheduler (`watch_scheduler`) the scheduler's own calls mark generations and steps. Where the transformer is
    called on past its last step, or at other timesteps without a step of it, another scheduler is at work (a second
    pipeline with the same transformer): until its own next ``set_timesteps`` it is as if there were none. Without one
    they are inferred from the timesteps: a move in the family's direction is a new step, a move against it a new
    generation, and the same timestep again is another branch, a repeated step of a higher-order scheduler, or, after a
    generation of one step, a new generation; which of them follows from how many branches the first step had.
    """

    def __init__(self, num_steps: int | None, direction: int) -> None:
        self._told_steps = num_steps
        self._direction = direction
        self._scheduler: Any = None
        self._stands_still = False
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """Forget the generation: the next call starts one."""
        self._index = -1
        self._branches_per_step = 0
        self._step = _Step()
        self._fresh = True
        self._step_closed = True
        self._conditions: dict[Any, list[Any]] = {}

    # -- with a scheduler ---------------------------------------------------------------------------------------------

    def watch_scheduler(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._stands_still = False

    def generation_starts(self) -> None:
        self.reset()
        self._stands_still = False

    def step_ends(self) -> None:
        self._step_closed = True

    @property
    def _is_told(self) -> bool:
        """Whether the scheduler marks generations and steps."""
        return self._scheduler is not None and not self._stands_still

    def _is_passed_by(self, value: float | None) -> bool:
        """Whether another scheduler than the one watched has led to a call at this timestep."""
        if not self._is_told or self._fresh or self._index < 0:
            return False
        if not self._step_closed:
            return value != self._step.timestep
        last = self._num_steps()
        return last is not None and self._index >= last - 1

    # -- each call of the transformer ---------------------------------------------------------------------------------

    def begin(self, timestep: Any, sample: torch.Tensor, context: str | None, conditioning: Sequence[Any] = ()) -> Call:
        """Place a call.

        ``sample`` is the transformer's input, ``context`` the name given through cache_context, ``conditioning`` what
        stays the same for all steps of a branch.
        """
        value = _scalar(timestep)
        passed_by = self._is_passed_by(value)
        if passed_by:
            self._stands_still = True
            logger.warning(
                "the transformer is called without the scheduler that its cache follows; steps are told by timesteps"
            )
        starts = (
            self._fresh
            or passed_by
            or (not self._is_told and self._is_new_generation(value, sample, context, conditioning))
        )
        if starts:
            self.reset()
            self._fresh = False
        if self._index < 0 or self._is_new_step(value, sample, context):
            if self._index == 0:
                self._branches_per_step = len(self._step.names)
            self._index += 1
            self._step = _Step(value, sample if self._index == 0 else None)
            self._step_closed = False
        name = self._next_name(context)
        self._conditions.setdefault(name, list(conditioning))
        self._step.names.append(name)
        self._step.shapes.add(tuple(sample.shape))
        branch = (name, tuple(sample.shape), sample.dtype, str(sample.device))
        return Call(self._index, branch, starts, self._num_steps())

    def _next_name(self, context: str | None) -> Any:
        """A branch's name: its context, or its place among the step's calls without one."""
        return context if context is not None else sum(not isinstance(seen, str) for seen in self._step.names)

    def _num_steps(self) -> int | None:
        if not self._is_told:
            return self._told_steps
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None:
            return self._told_steps
        return max(1, len(timesteps) - (getattr(self._scheduler, "begin_index", None) or 0))

    def _is_new_step(self, value: float | None, sample: torch.Tensor, context: str | None) -> bool:
        if self._is_told:
            return self._step_closed
        if value != self._step.timestep:
            return True
        return self._index > 0 and self._repeats(sample, context)

    def _repeats(self, sample: torch.Tensor, context: str | None) -> bool:
        """The same timestep came again and it is none of the branches still to come."""
        if context is not None:
            return context in self._step.names
        if tuple(sample.shape) not in self._step.shapes:
            return False
        return len(self._step.names) >= max(1, self._branches_per_step)

    def _is_new_generation(
        self, value: float | None, sample: torch.Tensor, context: str | None, conditioning: Sequence[Any]
    ) -> bool:
        previous = self._step.timestep
        if value is None or previous is None:
            return value is not previous
        if value == previous:
            if self._index == 0:
                return not self._is_branch_of_first_step(sample, context)
            return self._ran_out() and self._repeats(sample, context)
        if (value - previous) * self._direction < 0:
            return True
        known = self._conditions.get(0 if context is None else context)
        if known is not None and not _same(known, conditioning):
            return True
        if self._ran_out() and not self._warned:
            self._warned = True
            logger.warning(
                "the generation goes on after num_steps=%d steps; the rest is treated as a new generation",
                self._told_steps,
            )
        return self._ran_out()

    def _is_branch_of_first_step(self, sample: torch.Tensor, context: str | None) -> bool:
        if context is not None and context in self._step.names:
            return False
        first = self._step.sample
        if first is None or first.shape != sample.shape:
            return first is not None and context is not None
        return first is sample or _equal(first, sample)

    def _ran_out(self) -> bool:
        return self._told_steps is not None and self._index >= self._told_steps - 1


def _same(known: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether two lists of tensors hold the same values. Pipelines hand over the same objects, which costs nothing."""
    return all(
        a is b or (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and _equal(a, b))
        for a, b in zip(known, given, strict=True)
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _scalar(timestep: Any) -> float | None:
    if timestep is None:
        return None
    if isinstance(timestep, torch.Tensor):
        return float(timestep.detach().max())
    return float(timestep)
