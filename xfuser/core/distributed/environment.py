"""Device and threads of this process. The only place that names an accelerator."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

DEVICES = ("auto", "cpu", "cuda")


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
    return torch.device("cuda" if present and name != "cpu" else "cpu")


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
