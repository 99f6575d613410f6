"""What a calibration belongs to: the denoisers' weights, the scheduler and its grid of steps, and the step's form."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from xfuser.core.modules import uncompiled
from xfuser.model_executor.cache.adacorrection.trajectory.layout import Layout

SAMPLED = 4  # entries of every parameter


def describe_denoiser(module: nn.Module) -> dict[str, Any]:
    """Name a denoiser's class, configuration and weights, LoRA merged or active among them."""
    module = uncompiled(module)
    config = getattr(module, "config", None) or {}
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)  # transformers', diffusers'
    config = {key: _plain(value) for key, value in config.items() if not key.startswith("_")}
    return {"class": type(module).__name__, "config": _digest(config), "weights": weights_digest(module)}


def weights_digest(module: nn.Module) -> str:
    """Hash a sample of a module's weights, and the state of its adapters.

    Parameters that hold no values here (on the meta device, as sequential offloading leaves them) count by name and
    shape alone.
    """
    digest = hashlib.sha256()
    parameters = list(module.named_parameters())
    where = tuple((id(parameter), parameter.data_ptr()) for _, parameter in parameters)
    known = _VIEWS.get(module)
    if known is None or known[0] != where:
        known = _VIEWS[module] = (where, *_sampled(parameters))
    _, names, views = known
    digest.update(names)
    # One transfer a device, not one a parameter.
    for device in dict.fromkeys(view.device for view in views):
        values = torch.cat([view.to(torch.bfloat16) for view in views if view.device == device])
        digest.update(values.view(torch.int16).cpu().numpy().tobytes())
    for name, child in module.named_modules():
        if hasattr(child, "scaling") and hasattr(child, "active_adapters"):
            state = (child.active_adapters, child.scaling, child.merged, child.disable_adapters)
            digest.update(f"{name}{state}".encode())
    return digest.hexdigest()


def _sampled(parameters: list[tuple[str, nn.Parameter]]) -> tuple[bytes, list[torch.Tensor]]:
    """Name all parameters, and view a few entries of each that holds values here."""
    names, views = [], []
    for name, parameter in parameters:
        names.append(f"{name}{tuple(parameter.shape)}")
        if parameter.device.type == "meta" or parameter.numel() == 0 or not parameter.is_contiguous():
            continue
        flat = parameter.detach().view(-1)
        stride = max(1, flat.numel() // SAMPLED)
        views.append(flat[stride // 2 :: stride][:SAMPLED])
    return "\n".join(names).encode(), views


# Views of the same storage see every change; they are made anew where a parameter was replaced or moved.
_VIEWS: WeakKeyDictionary[nn.Module, tuple[Any, bytes, list[torch.Tensor]]] = WeakKeyDictionary()


def describe_scheduler(scheduler: Any, first: float | None) -> dict[str, Any]:
    """Name a scheduler's class, configuration, timesteps and sigmas, and the timestep that begins."""
    config = {key: _plain(value) for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    grid = {}
    for name in ("timesteps", "sigmas"):
        values = getattr(scheduler, name, None)
        if isinstance(values, torch.Tensor):
            grid[name] = [float(f"{value:.6g}") for value in values.flatten().tolist()]
    return {
        "class": type(scheduler).__name__,
        "config": _digest(config),
        "grid": _digest(grid),
        "num_timesteps": len(grid.get("timesteps", [])),
        "first": first,
    }


def fingerprint(
    denoisers: dict[str, dict[str, Any]], scheduler: dict[str, Any], layout: Layout, reference: str | None
) -> tuple[str, dict[str, Any]]:
    """Make the key of a calibration, and what it stands for."""
    document = {
        "denoisers": denoisers,
        "scheduler": scheduler,
        "calls": layout.calls,
        "guidance": len(layout.places) == 2,
        "halves": layout.halves,
        "reference": reference,
    }
    return _digest(document), document


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Say in which respect two fingerprints differ first."""
    if ours["scheduler"] != theirs["scheduler"]:
        if ours["scheduler"]["class"] != theirs["scheduler"]["class"]:
            return f"scheduler {theirs['scheduler']['class']}, this is {ours['scheduler']['class']}"
        counts = theirs["scheduler"]["num_timesteps"], ours["scheduler"]["num_timesteps"]
        return f"{counts[0]} timesteps, this has {counts[1]}" if counts[0] != counts[1] else "other scheduler settings"
    if ours["denoisers"] != theirs["denoisers"]:
        return "another denoiser, or other weights of it"
    if ours["guidance"] != theirs["guidance"]:
        return "guidance on" if theirs["guidance"] else "guidance off"
    return "another form of step"


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()
