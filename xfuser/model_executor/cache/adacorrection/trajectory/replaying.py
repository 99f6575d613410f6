"""Make a pipeline's call again: with the same random numbers, with other arguments, on a finer grid of steps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CALLBACKS = ("callback", "callback_on_step_end")


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
        return cls._read(found, torch.device(getattr(pipeline, "_execution_device", None) or "cpu"))

    @classmethod
    def _read(cls, generators: list[torch.Generator], device: torch.device) -> RandomState:
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        states = [generator.get_state() for generator in generators]
        return cls(generators, states, device, torch.get_rng_state(), accelerator)

    def restore(self) -> None:
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def now(self) -> RandomState:
        """Take the same generators' states as they are now."""
        return self._read(self.generators, self.device)


@dataclass(frozen=True)
class PipelineCall:
    """One call of a pipeline that has returned: enough to make it again."""

    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    result: Any

    def again(self, **changes: Any) -> Any:
        """Make it with the same random numbers, without the user's callbacks, and with some arguments changed."""
        args, kwargs = by_name(self.original, self.args, self.kwargs)
        quiet = {name: value for name, value in kwargs.items() if name not in CALLBACKS}
        self.random.restore()
        return self.original(*args, **(quiet | changes))


class OtherGrid(Exception):  # noqa: N818 (it ends a run that cannot serve, and is no error of anybody)
    """A finer run does not come by the coarse one's timesteps."""


class Finer:
    """Watches a run on a finer grid and keeps the latents at the coarse grid's timesteps.

    Args:
        factor: Steps of the run to one of the coarse grid.
        timesteps: The coarse grid's.
    """

    def __init__(self, factor: int, timesteps: list[float]) -> None:
        self._factor, self._timesteps, self._step = factor, timesteps, 0
        self._kept: list[torch.Tensor] = []
        self._last = torch.empty(0)

    def see(self, timestep: float, sample: torch.Tensor, result: torch.Tensor) -> None:
        """Take in a step (OtherGrid where its timestep is not the coarse grid's)."""
        place, between = divmod(self._step, self._factor)
        if not between and place < len(self._timesteps):
            # Schedulers round timesteps to whole numbers.
            if not math.isclose(timestep, self._timesteps[place], rel_tol=1e-4, abs_tol=0.51):
                raise OtherGrid
            self._kept.append(sample.detach().to("cpu", torch.float32, copy=True))
        self._last = result.detach().to("cpu", torch.float32, copy=True)
        self._step += 1

    def latents(self) -> list[torch.Tensor]:
        """List x_0 … x_T of the coarse grid (OtherGrid where the run was too short)."""
        if len(self._kept) != len(self._timesteps):
            raise OtherGrid
        return [*self._kept, self._last]


def by_name(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give positional arguments their names, so that one can be replaced, where the bound call allows that."""
    names = []
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        names.append(parameter.name)
    if len(names) < len(args):
        return args, kwargs
    return (), dict(zip(names, args, strict=False)) | kwargs


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler draws noise at its steps, so that no finer run is the same solution."""
    name = type(scheduler).__name__.lower()
    by_class = any(part in name for part in ("ancestral", "ddpm", "sde", "lcm", "tcd", "edmeuler"))
    stochastic = bool(getattr(scheduler.config, "stochastic_sampling", False))
    return by_class or stochastic or "sde" in str(getattr(scheduler.config, "algorithm_type", ""))
