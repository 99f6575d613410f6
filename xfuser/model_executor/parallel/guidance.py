"""CFG parallelism: each rank evaluates one branch of classifier-free guidance, and only that one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from xfuser.core.distributed.clock import Clock
from xfuser.core.shards import narrow_batch, part
from xfuser.model_executor.adapters import BoundArguments
from xfuser.model_executor.cache.adacorrection.trajectory.branches import sample_of, with_sample

BRANCHES = 2


class BatchedBranches:
    """For pipelines that put both branches into one batch: every rank takes its half of it."""

    def __init__(self, group: dist.ProcessGroup | None, index: int, clock: Clock) -> None:
        self._group, self._index, self._clock = group, index, clock

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        arguments = BoundArguments(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            named = arguments.named(args, kwargs)
            batch = named["hidden_states"].shape[0]
            if batch % BRANCHES:
                raise ValueError(
                    f"--use_cfg_parallel: the transformer was called with a batch of {batch}, which holds no two "
                    "branches; use guidance (--guidance_scale above 1), or leave --use_cfg_parallel out"
                )
            output = original(**narrow_batch(named, batch, part(batch, BRANCHES, self._index)))
            ours = sample_of(output).contiguous()
            halves = [torch.empty_like(ours) for _ in range(BRANCHES)]
            with self._clock("waiting"):
                dist.all_gather(halves, ours, group=self._group)
            return with_sample(output, torch.cat(halves))

        return forward

    def step_ends(self) -> None:
        """Every call is complete in itself."""


class BranchCalls:
    """For pipelines that call the transformer once a branch: every rank answers its own call.

    The call of the other rank's branch returns at once, with a tensor that is filled when the last branch has been
    called, which is before the pipeline reads any of them.
    """

    def __init__(self, group: dist.ProcessGroup | None, index: int, clock: Clock) -> None:
        self._group, self._index, self._clock = group, index, clock
        self._samples: list[torch.Tensor] = []

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        arguments = BoundArguments(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            named = arguments.named(args, kwargs)
            if len(self._samples) == self._index:
                output = original(**named)
                sample = sample_of(output).contiguous()
                output = with_sample(output, sample)
            else:
                sample = torch.empty_like(named["hidden_states"])
                output = (sample,)
                if named.get("return_dict", True):
                    raise ValueError("--use_cfg_parallel: call the transformer with return_dict=False")
            self._samples.append(sample)
            if len(self._samples) == BRANCHES:
                with self._clock("waiting"):
                    for branch, each in enumerate(self._samples):
                        dist.broadcast(each, src=dist.get_global_rank(self._group, branch), group=self._group)
                self._samples.clear()
            return output

        return forward

    def step_ends(self) -> None:
        """Refuse a step that had one branch only: this rank's answer, or nothing, would stand for both."""
        missing, self._samples = len(self._samples), []
        if missing:
            raise ValueError(
                "--use_cfg_parallel: this step called the transformer once; give a negative prompt and "
                "true_cfg_scale above 1, or leave --use_cfg_parallel out"
            )
