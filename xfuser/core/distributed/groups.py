"""Groups of processes as xDiT's scripts use them: who is in one, and what its members exchange."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class WeakGroup:
    """torch's group, for as long as the job lasts.

    A script keeps the groups that it asked for until it ends, and a process that still holds one of torch's at its very
    end is seldom, but at times aborted by the threads of the communication library.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = None if group is None else weakref.ref(group)

    def __call__(self) -> dist.ProcessGroup | None:
        return None if self._group is None else self._group()


@dataclass(frozen=True)
class Group:
    """Processes that belong together, as seen by one of them.

    Args:
        ranks: Their ranks in the job, in the group's order.
        rank: This process's rank in the job.
        local_rank: Its number on its machine.
        device: Where it computes.
        members: torch's group of them; ``None`` where the job is one process alone.
    """

    ranks: tuple[int, ...]
    rank: int
    local_rank: int
    device: torch.device
    members: WeakGroup

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """torch's group for what lies on the device; ``None`` where the job is one process alone, or is over."""
        return self.members()

    @property
    def world_size(self) -> int:
        """Processes in the group."""
        return len(self.ranks)

    @property
    def rank_in_group(self) -> int:
        return self.ranks.index(self.rank)

    @property
    def first_rank(self) -> int:
        """The first process's rank in the job."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """The last process's rank in the job."""
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        """The following process's rank in the job; the last one's is the first."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """The preceding process's rank in the job; the first one's is the last."""
        return self.ranks[self.rank_in_group - 1]

    def barrier(self) -> None:
        """Wait for all processes of the group."""
        if self.world_size > 1:
            dist.barrier(self.device_group)

    def all_gather(
        self, input_: torch.Tensor, dim: int = 0, separate_tensors: bool = False
    ) -> torch.Tensor | list[torch.Tensor]:
        """Give every process what all of them hold. Collective.

        Args:
            input_: This process's part; all parts are of one shape.
            dim: The dimension along which the parts are put together, in the group's order.
            separate_tensors: Whether to leave the parts apart.
        """
        parts = [input_]
        if self.world_size > 1:
            parts = [torch.empty_like(input_, memory_format=torch.contiguous_format) for _ in self.ranks]
            dist.all_gather(parts, input_.contiguous(), group=self.device_group)
        if separate_tensors:
            return parts
        return torch.cat(parts, dim) if self.world_size > 1 else input_

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """Give one process what all of them hold; the others get ``None``. Collective.

        Args:
            input_: This process's part; all parts are of one shape.
            dst: The receiving process's place in the group.
            dim: The dimension along which the parts are put together, in the group's order.

        Raises:
            ValueError: The group has no such place.
        """
        self._check_place(dst)
        if self.world_size == 1:
            return input_
        receives = self.rank_in_group == dst
        parts = [torch.empty_like(input_, memory_format=torch.contiguous_format) for _ in self.ranks]
        dist.gather(input_.contiguous(), parts if receives else None, dst=self.ranks[dst], group=self.device_group)
        return torch.cat(parts, dim) if receives else None

    def all_reduce(self, input_: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """Put every process's tensor together, element by element, in place. Collective."""
        if self.world_size > 1:
            dist.all_reduce(input_, op=op, group=self.device_group)
        return input_

    def broadcast(self, input_: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrite every process's tensor with that of the process at place ``src``. Collective.

        Raises:
            ValueError: The group has no such place.
        """
        self._check_place(src)
        if self.world_size > 1:
            dist.broadcast(input_, src=self.ranks[src], group=self.device_group)
        return input_

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Give every process the object of the one at place ``src``, by way of pickle. Collective.

        Raises:
            ValueError: The group has no such place.
        """
        self._check_place(src)
        held = [obj]
        if self.world_size > 1:
            dist.broadcast_object_list(held, src=self.ranks[src], group=self.device_group, device=self.device)
        return held[0]

    def _check_place(self, place: int) -> None:
        if not 0 <= place < self.world_size:
            raise ValueError(f"place {place}: the group has {self.world_size} processes, counted from 0")


@dataclass(frozen=True)
class SequenceGroup(Group):
    """Ranks that share the tokens of an image, and within them those of Ulysses and of the ring.

    Args:
        ulysses: torch's group of the ranks that exchange tokens for heads.
        ring: torch's group of the ranks that pass keys and values round.
        ulysses_rank: This process's place among the first.
        ulysses_world_size: How many those are.
        ring_rank: This process's place among the second.
        ring_world_size: How many those are.
    """

    ulysses: WeakGroup
    ring: WeakGroup
    ulysses_rank: int
    ulysses_world_size: int
    ring_rank: int
    ring_world_size: int

    @property
    def ulysses_group(self) -> dist.ProcessGroup | None:
        """torch's group of the ranks that exchange tokens for heads."""
        return self.ulysses()

    @property
    def ring_group(self) -> dist.ProcessGroup | None:
        """torch's group of the ranks that pass keys and values round."""
        return self.ring()
