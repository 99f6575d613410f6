"""Make a pipeline's call again: with the same random numbers, with other arguments, on a finer grid of steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class RandomState:
    """The generators that a call draws from, as they were before it."""

    generators: list[torch.Generator]
    states: list[torch.Tensor]
    device: torch.device
    cpu: torch.Tensor
    accelerator: torch.Tensor | None

    @classmethod
    def of(cls, pipeline: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomState:
        found: list[torch.Generator] = []
        for value in (*args, *kwargs.values()):
            several = value if isinstance(value, (list, tuple)) else [value]
            found += [each for each in several if isinstance(each, torch.Generator)]
        device = torch.device(getattr(pipeline, "_execution_device", None) or "cpu")
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        states = [generator.get_state() for generator in found]
        return cls(found, states, device, torch.get_rng_state(), accelerator)

    def restore(self) -> None:
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def now(self) -> RandomState:
        """Take the same generators' states as they are now."""
        accelerator = None
        if self.accelerator is not None:
            accelerator = torch.get_device_module(self.device).get_rng_state(self.device)
        states = [generator.get_state() for generator in self.generators]
        return RandomState(self.generators, states, self.device, torch.get_rng_state(), accelerator)


class Finer:
    """Watches a run on a finer grid and keeps the latents at the coarse grid's levels."""

    def __init__(self, factor: int, steps: int) -> None:
        self._factor, self._steps, self._step = factor, steps, 0
        self._kept: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None

    def see(self, sample: torch.Tensor, result: torch.Tensor) -> None:
        if self._step % self._factor == 0 and len(self._kept) < self._steps:
            self._kept.append(sample.detach().to("cpu", torch.float32, copy=True))
        self._last = result.detach().to("cpu", torch.float32, copy=True)
        self._step += 1

    def latents(self) -> list[torch.Tensor]:
        assert self._last is not None
        return [*self._kept, self._last]


def by_name(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give positional arguments their names, so that one can be replaced, where the call allows that."""
    names = []
    for parameter in list(inspect.signature(call).parameters.values())[1:]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        names.append(parameter.name)
    if len(names) < len(args):
        return args, kwargs
    return (), dict(zip(names, args, strict=False)) | kwargs


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler draws noise at its steps, so that no finer run is the same solution."""
    name = type(scheduler).__name__.lower()
    by_name = any(part in name for part in ("ancestral", "ddpm", "sde", "lcm", "tcd", "edmeuler"))
    return by_name or "sde" in str(getattr(scheduler.config, "algorithm_type", ""))


def grid_of(scheduler: Any) -> list[float]:
    return [float(each) for each in scheduler.timesteps.flatten().tolist()]


def contains(fine: list[float], coarse: list[float], factor: int) -> bool:
    picked = fine[::factor][: len(coarse)]
    return len(picked) == len(coarse) and np.allclose(picked, coarse, rtol=1e-4, atol=0.51)
