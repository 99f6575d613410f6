"""This process: its rank, device and threads. The only place that names an accelerator."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from xfuser.config.launched import launched, local_rank, rank, world_size  # noqa: F401 (the rest is found here)

DEVICES = ("auto", "cpu", "cuda")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
_starts = itertools.count()

_timeout: float | None = None


def check_device(name: str) -> None:
    """Refuse a device that no machine has (ValueError)."""
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not known; choose one of {', '.join(DEVICES)}")


def choose_device(name: str = "auto") -> torch.device:
    """The device to run on; ``auto`` takes an accelerator where there is one.

    Raises:
        ValueError: The name is unknown, or that device is not present.
    """
    check_device(name)
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; use --device cpu")
    if not present or name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank()) if launched() else torch.device("cuda")


def device_count(device: torch.device) -> int | None:
    """Accelerators of this machine; ``None`` where the processor computes."""
    return None if device.type == "cpu" else torch.cuda.device_count()


def accelerators_wanted(name: str, present: bool) -> int:
    """How many accelerators a rank asks a cluster for.

    Args:
        name: A device, as for `choose_device`.
        present: Whether any machine of the cluster has one. An autoscaling cluster has none before they are asked for,
            and is given a name other than ``auto``.
    """
    return int(name == "cuda" or (name == "auto" and present))


@dataclass(frozen=True)
class Meeting:
    """Where processes meet that no launcher has started: a URL that torch knows, and what it is told there."""

    url: str
    rank: int
    world_size: int


def numbered(device: torch.device, number: int) -> torch.device:
    """The accelerator of this number, where an accelerator was chosen without one."""
    return device if device.type == "cpu" or device.index is not None else torch.device(device.type, number)


def backend_of(device: torch.device) -> str:
    """torch's name of what carries tensors between processes that compute on such a device."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def check_backend(backend: str | None, device: torch.device) -> None:
    """Refuse what cannot carry this device's tensors (ValueError)."""
    fitting = backend_of(device)
    if backend is not None and backend not in (fitting, fitting.rpartition(":")[2]):
        raise ValueError(f"backend {backend!r} carries no tensors of {device}; use {fitting!r}, or leave it out")


def join_processes(device: torch.device, timeout: float | None = None, meeting: Meeting | None = None) -> None:
    """Meet the job's other processes, where there are several; one alone needs no group.

    Args:
        device: Where this process computes: gloo carries what lies on a CPU, NCCL what lies on an accelerator.
        timeout: Seconds after which a missing peer is an error; by default torch's own.
        meeting: Where they meet, if not where torchrun has told them to.
    """
    global _timeout
    if dist.is_initialized() or not (launched() or meeting):
        return
    _timeout = timeout
    limit = dist.default_pg_timeout if timeout is None else datetime.timedelta(seconds=timeout)
    if meeting is None:
        store, place, processes = next(dist.rendezvous("env://", timeout=limit))
    else:
        store, place, processes = next(dist.rendezvous(meeting.url, meeting.rank, meeting.world_size, timeout=limit))
    # The launcher's store outlives a group: a second one would find the first's addresses there, and wait for them.
    store = dist.PrefixStore(f"start{next(_starts)}", store)
    settings: dict[str, Any] = {"store": store, "rank": place, "world_size": processes, "timeout": limit}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        settings["device_id"] = device
    dist.init_process_group(backend_of(device), **settings)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, of an accelerator or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _MEMORY_WORDS)


def free_memory() -> None:
    """Give back what an accelerator's allocator keeps."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


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
