"""One exchange a step: sums of all ranks that work on the same image, added to the same bits on each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from xfuser.core.distributed.clock import Clock


class Disagreement(RuntimeError):
    """Two ranks that share an image have decided differently."""


class SumExchange:
    """Adds packed vectors of sums over the deciding group.

    Every rank gathers all vectors and adds them in rank order in float64, so the result has identical bits on every
    rank. A reduction inside the communication library may add in an order of its own on each rank, and a plan
    computed from numbers that differ in the last bit is how cached jobs hang.

    Args:
        group: The control group (gloo, CPU tensors). ``None`` is one process: the sum is the vector itself.
        verify: Whether `verify` compares anything.
        clock: Where the time of the exchanges is booked.

    Attributes:
        collectives: Exchanges of sums so far; those of `verify` and of `share` are not among them.
        bytes_sent: What this rank has sent in them.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, verify: bool = False, clock: Clock | None = None
    ) -> None:
        self.group, self._verify = group, verify
        self.clock = clock or Clock()
        self.collectives = 0
        self.bytes_sent = 0

    def sum(self, vector: torch.Tensor) -> list[float]:
        """The sum over the group of a one-dimensional vector, as float64 numbers on the host.

        The vector travels in its own precision; what is added is exact in float64.
        """
        if self.group is None:
            return vector.detach().to(device="cpu", dtype=torch.float64).tolist()
        with self.clock("compute"):  # an accelerator is waited for here, not for its peers
            local = vector.detach().cpu().contiguous()
        if local.numel() == 0:
            return []
        self.collectives += 1
        self.bytes_sent += local.numel() * local.element_size()
        with self.clock("statistics"):
            return self._add(local)

    def share(self, numbers: Sequence[float]) -> list[float]:
        """The sum over the group of facts that are exchanged once, outside the steps' own exchange."""
        local = torch.tensor(list(numbers), dtype=torch.float64)
        return local.tolist() if self.group is None else self._add(local)

    def _add(self, local: torch.Tensor) -> list[float]:
        gathered = self._gather(local)
        total = gathered[0].double()
        for part in gathered[1:]:
            total = total + part.double()
        return total.tolist()

    def verify(self, step: int, plan: Sequence[float]) -> None:
        """Compare one number a block over the group.

        Raises:
            Disagreement: On every rank alike, where two differ; it names step, block and rank.
        """
        if self.group is None or not self._verify:
            return
        gathered = self._gather(torch.tensor(list(plan), dtype=torch.float64))
        for rank, other in enumerate(gathered[1:], start=1):
            differing = (gathered[0] != other).nonzero().flatten()
            if len(differing):
                raise Disagreement(
                    f"step {step}, block {int(differing[0])}: rank {dist.get_global_rank(self.group, rank)} has "
                    f"another plan than rank {dist.get_global_rank(self.group, 0)}"
                )

    def _gather(self, local: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, local, group=self.group)
        return gathered
