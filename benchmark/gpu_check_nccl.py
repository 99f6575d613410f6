"""One process of `benchmark/gpu_check.py`: an all-reduce whose sum is known, and its bandwidth."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from xfuser.core.distributed.environment import choose_device, join_processes, leave_processes, synchronize

NUMBERS, TIMES = 1 << 24, 10


def main() -> None:
    device = choose_device("auto")
    join_processes(device, 120)
    world, rank = dist.get_world_size(), dist.get_rank()
    tensor = torch.full((NUMBERS,), float(rank + 1), device=device)
    dist.all_reduce(tensor)
    if not bool((tensor == world * (world + 1) / 2).all()):
        raise RuntimeError(f"rank {rank}: the all-reduce has a wrong sum")
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(tensor)
    synchronize(device)
    rate = TIMES * 4 * NUMBERS * 2 * (world - 1) / world / (time.perf_counter() - begin)
    if rank == 0:
        print(f"{world} ranks, bus bandwidth {rate / 1e9:.1f} GB/s", flush=True)
    leave_processes()


if __name__ == "__main__":
    main()
