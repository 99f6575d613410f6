"""CFG parallelism: each rank evaluates one branch of classifier-free guidance, and only that one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xfuser.core.distributed.clock import Clock
from xfuser.core.tokens import narrow_batch, part
from xfuser.model_executor.adapters import BoundArguments, spec_of
from xfuser.model_executor.cache.adacorrection.trajectory.branches import sample_of, with_sample
from xfuser.model_executor.cache.patching import Replacement, named_contexts, scheduler_calls

BRANCHES = 2


class BatchedBranches:
    """For pipelines that put both branches into one batch: every rank takes its half of it."""

    def __init__(self, group: dist.ProcessGroup | None, index: int, clock: Clock) -> None:
        self._group, self._index, self._clock = group, index, clock

    def attach(self, pipeline: Any, transformer: nn.Module) -> list[Replacement]:
        """Wrap a denoiser; every call is complete in itself."""
        self._spec = spec_of(transformer)
        return [Replacement(transformer, "forward", self._wrap)]

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        arguments, spec = BoundArguments(original), self._spec

        def forward(*args: Any, **kwargs: Any) -> Any:
            named = arguments.named(args, kwargs)
            batch = named[spec.sample].shape[0]
            if batch % BRANCHES:
                raise ValueError(
                    f"--use_cfg_parallel: the transformer was called with a batch of {batch}, which holds no two "
                    "branches; use guidance (--guidance_scale above 1), or leave --use_cfg_parallel out"
                )
            output = original(**narrow_batch(named, spec.per_image, batch, part(batch, BRANCHES, self._index)))
            ours = sample_of(output).contiguous()
            halves = [torch.empty_like(ours) for _ in range(BRANCHES)]
            with self._clock("waiting"):
                dist.all_gather(halves, ours, group=self._group)
            return with_sample(output, torch.cat(halves))

        return forward


class SchedulerMarks:
    """Tells where generations start and steps end, by the calls of the scheduler that a pipeline has now.

    Args:
        pipeline: The pipeline.
        starts: Called before ``set_timesteps``.
        steps: Called before ``step``.
    """

    def __init__(self, pipeline: Any, starts: Callable[[], None], steps: Callable[[], None]) -> None:
        self._pipeline, self._told = pipeline, (starts, steps)
        self._scheduler: Any = None
        self._replacements: list[Replacement] = []
        self.follow()

    def follow(self) -> None:
        """Move to the pipeline's present scheduler, which may have been assigned to it at any time."""
        if self._pipeline.scheduler is not self._scheduler:
            self.undo()
            self._scheduler = self._pipeline.scheduler
            self._replacements = scheduler_calls(self._scheduler, *self._told)

    def undo(self) -> None:
        """Leave the scheduler."""
        while self._replacements:
            self._replacements.pop().undo()
        self._scheduler = None


@dataclass
class _Call:
    """One branch's call of the transformer, and the tensor that was returned for it."""

    arguments: dict[str, Any]
    context: str | None
    sample: torch.Tensor


class BranchCalls:
    """For pipelines that call the transformer once a branch: every rank answers its own call.

    Every call returns at once, with a tensor that is filled when the last branch has been called, which is before the
    pipeline reads any of them. Nothing is evaluated until then: a rank that evaluated the first call would wait, at its
    first exchange, for one whose call never comes, where all of them are to refuse the step.
    """

    def __init__(self, group: dist.ProcessGroup | None, index: int, clock: Clock) -> None:
        self._group, self._index, self._clock = group, index, clock
        self._calls: list[_Call] = []
        self._context: str | None = None
        self._enter: Callable[[str], Any] | None = None

    def attach(self, pipeline: Any, transformer: nn.Module) -> list[Replacement | SchedulerMarks]:
        """Wrap a denoiser, and have the scheduler tell where steps and generations end."""
        self._sample = spec_of(transformer).sample
        marks = SchedulerMarks(pipeline, self._calls.clear, self._check_step)
        layers: list[Replacement | SchedulerMarks] = [marks, Replacement(transformer, "forward", self._wrap)]
        if hasattr(transformer, "cache_context"):
            self._enter = transformer.cache_context
            layers.append(Replacement(transformer, "cache_context", named_contexts(self._note)))
        return layers

    def _note(self, context: str | None) -> None:
        self._context = context

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        arguments = BoundArguments(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            named = arguments.named(args, kwargs)
            if named.get("return_dict", True):
                raise ValueError("--use_cfg_parallel: call the transformer with return_dict=False")
            sample = torch.empty_like(named[self._sample])
            self._calls.append(_Call(_kept(named), self._context, sample))
            if len(self._calls) == BRANCHES:
                calls = self._calls[:]
                self._calls.clear()
                self._answer(original, calls)
            return (sample,)

        return forward

    def _answer(self, original: Callable[..., Any], calls: list[_Call]) -> None:
        own = calls[self._index]
        named = self._enter is not None and own.context is not None and own.context != self._context
        with self._enter(own.context) if named else nullcontext():
            answer = sample_of(original(**own.arguments))
        if answer.shape != own.sample.shape:
            raise ValueError(
                f"--use_cfg_parallel: the transformer makes {tuple(answer.shape)} of {tuple(own.sample.shape)}, and "
                "must leave the shape as it is; leave --use_cfg_parallel out"
            )
        own.sample.copy_(answer)
        with self._clock("waiting"):
            for branch, call in enumerate(calls):
                dist.broadcast(call.sample, src=dist.get_global_rank(self._group, branch), group=self._group)

    def _check_step(self) -> None:
        """Refuse a step that had one branch only: nothing has been evaluated for it, on any rank."""
        missing = len(self._calls)
        self._calls.clear()
        if missing:
            raise ValueError(
                "--use_cfg_parallel: this step called the transformer once; give a negative prompt and "
                "true_cfg_scale above 1, or leave --use_cfg_parallel out"
            )


def _kept(value: Any) -> Any:
    """The same tensors in containers of their own: pipelines change a dict between the two calls."""
    if isinstance(value, dict):
        return {name: _kept(each) for name, each in value.items()}
    return [_kept(each) for each in value] if type(value) is list else value
