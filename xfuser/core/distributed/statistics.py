"""One exchange a step: sums of all ranks that work on the same image, added to the same bits on each of them."""

from __future__ import annotations

import torch
import torch.distributed as dist


class SumExchange:
    """Adds packed vectors of sums over the deciding group.

    Every rank gathers all vectors and adds them in rank order in float64, so the result has identical bits on every
    rank. A reduction inside the communication library may add in an order of its own on each rank, and a plan
    computed from numbers that differ in the last bit is how cached jobs hang.

    Args:
        group: The control group (gloo, CPU tensors). ``None`` is one process: the sum is the vector itself.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.collectives = 0
        self.bytes_sent = 0

    def sum(self, vector: torch.Tensor) -> list[float]:
        """The sum over the group of a one-dimensional vector, as float64 numbers on the host."""
        local = vector.detach().to(device="cpu", dtype=torch.float64)
        if self.group is None:
            return local.tolist()
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, local.contiguous(), group=self.group)
        self.collectives += 1
        self.bytes_sent += local.numel() * local.element_size()
        total = gathered[0].clone()
        for part in gathered[1:]:
            total += part
        return total.tolist()
