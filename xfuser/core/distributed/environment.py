"""This process: its rank, device and threads. The only place that names an accelerator."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

LAUNCHED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
DEVICES = ("auto", "cpu", "cuda")
_starts = itertools.count()

_timeout: float | None = None


def choose_device(name: str = "auto") -> torch.device:
    """The device to run on; ``auto`` takes an accelerator where there is one.

    Raises:
        ValueError: The name is unknown, or that device is not present.
    """
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not known; choose one of {', '.join(DEVICES)}")
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; use --device cpu")
    if not present or name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank()) if launched() else torch.device("cuda")


def device_count(device: torch.device) -> int | None:
    """Accelerators of this machine; ``None`` where the processor computes."""
    return None if device.type == "cpu" else torch.cuda.device_count()


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, has started this process."""
    return all(name in os.environ for name in LAUNCHED_BY)


def world_size() -> int:
    """Processes of this job, before any of them has been contacted."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def join_processes(device: torch.device, timeout: float | None = None) -> None:
    """Meet the job's other processes, where torchrun has started several; one alone needs no group.

    Args:
        device: Where this process computes: gloo carries what lies on a CPU, NCCL what lies on an accelerator.
        timeout: Seconds after which a missing peer is an error; by default torch's own.
    """
    global _timeout
    if dist.is_initialized() or not launched():
        return
    _timeout = timeout
    limit = dist.default_pg_timeout if timeout is None else datetime.timedelta(seconds=timeout)
    store, place, processes = next(dist.rendezvous("env://", timeout=limit))
    # The launcher's store outlives a group: a second one would find the first's addresses there, and wait for them.
    store = dist.PrefixStore(f"start{next(_starts)}", store)
    settings: dict[str, Any] = {"store": store, "rank": place, "world_size": processes, "timeout": limit}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **settings)
    else:
        dist.init_process_group("gloo", **settings)


def limit_waiting(group: dist.ProcessGroup) -> None:
    """Give a group the timeout that `join_processes` was told; a new group has torch's own."""
    if _timeout is not None:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=_timeout), group)


def leave_processes() -> None:
    """Part from the job's other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def waiter(device: torch.device) -> Callable[[], None] | None:
    """What makes a clock true on this device; ``None`` where nothing has to be waited for."""
    return None if device.type == "cpu" else lambda: synchronize(device)


def memory_peak(device: torch.device) -> int | None:
    """The most bytes that this process has held on its accelerator; ``None`` on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished, so that a clock read afterwards is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place a measurement: versions, processor, threads, device."""
    import diffusers

    described = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        described["accelerator"] = torch.cuda.get_device_name(device)
    return described


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
