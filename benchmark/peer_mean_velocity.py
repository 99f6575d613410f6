"""MeanCache's scheme (arXiv 2601.19961) for a model that DDIM samples: rows of the comparison with other projects.

The paper caches the average velocity of a flow x = (1 − t) x₀ + t ε. DDIM's latents are such a flow's, scaled: with
t = σ / (α + σ) and x / (α + σ), a DDIM step without noise is an Euler step along ε − x₀. What the paper leaves to the
code (a window that ends at the present latent, its length chosen for every gap) follows
github.com/UnicomAI/MeanCache; their schedules are for other models, so evaluated steps are placed as the paper does:
the shortest path over recorded deviations, whose peaks a power makes dearer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler

from benchmark.peer_tools import Attached, Peer, Polynomial, StepCache, Subject

WINDOWS = range(1, 7)  # steps that a Jacobian-vector product is estimated over; over 1 it is zero, which is plain reuse
POWERS = (1.0, 2.0, 4.0)
LARGEST_GAP = 16


def mean_velocity(
    latents: Sequence[torch.Tensor], velocities: Sequence[torch.Tensor], times: torch.Tensor, window: int
) -> torch.Tensor:
    """Estimate the velocity of a step that is not evaluated from the ones before it.

    Args:
        latents: Those before every step so far, and the present one.
        velocities: Of every step so far.
        times: Of all steps and the end.
        window: Steps that the Jacobian-vector product is estimated over, at most.
    """
    now = len(velocities)
    start = max(now - window, 0)
    span = times[now] - times[start]
    average = (latents[now] - latents[start]) / span
    product = (velocities[start] - average) / span
    return velocities[-1] - product * (times[now + 1] - times[now])


def deviations(latents: torch.Tensor, velocities: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Compute how far a gap's average velocity is off its true one, [steps, steps + 1, windows]; infinite where no gap.

    Args:
        latents: Recorded, [steps + 1, values].
        velocities: Recorded, [steps, values].
        times: [steps + 1].
    """
    steps = len(velocities)
    off = torch.full((steps, steps + 1, len(WINDOWS)), torch.inf, dtype=times.dtype)
    for first in range(steps):
        for place, window in enumerate(WINDOWS):
            path, moved = list(latents[: first + 1]), list(velocities[: first + 1])
            for end in range(first + 1, min(first + LARGEST_GAP, steps) + 1):
                step = end - 1
                if step > first:
                    moved.append(mean_velocity(path, moved, times, window))
                path.append(path[-1] + moved[-1] * (times[end] - times[step]))
                error = (path[-1] - latents[end]) / (times[end] - times[first])
                off[first, end, place] = error.square().mean().sqrt()
    return off


def shortest_path(off: torch.Tensor, evaluations: int, power: float) -> tuple[list[int], list[int]]:
    """Place the evaluations where the deviations' powers sum up to least; their steps, and every step's window."""
    least, windows = off.min(dim=2)
    costs = least**power
    steps = len(costs)
    best = torch.full((evaluations + 1, steps + 1), torch.inf, dtype=costs.dtype)
    came = torch.zeros(evaluations + 1, steps + 1, dtype=torch.long)
    best[0, 0] = 0.0
    for count in range(1, evaluations + 1):
        best[count], came[count] = (best[count - 1, :steps, None] + costs).min(dim=0)
    nodes, end = [], steps
    chosen = [WINDOWS[0]] * steps
    for count in range(evaluations, 0, -1):
        first = int(came[count, end])
        chosen[first:end] = [WINDOWS[int(windows[first, end])]] * (end - first)
        nodes.insert(0, first)
        end = first
    return nodes, chosen


@dataclass
class MeanVelocity:
    """Watches a DDIM scheduler's steps, and gives those that are not evaluated their average velocity.

    Attributes:
        scheduler: Of a generation without noise.
        nodes: The evaluated steps; None while a generation is recorded.
        windows: Of every step.
    """

    scheduler: DDIMScheduler
    nodes: frozenset[int] | None = None
    windows: list[int] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    velocities: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._original: Callable[..., Any] = self.scheduler.step
        self.scheduler.step = self._step

    def times(self) -> torch.Tensor:
        """σ / (α + σ) of all steps and of the end, float64."""
        signal = self.scheduler.alphas_cumprod.double()[self.scheduler.timesteps.long().cpu()]
        signal = torch.cat([signal, torch.as_tensor(self.scheduler.final_alpha_cumprod).double().reshape(1)])
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        return sigma / (alpha + sigma)

    def _step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        if len(self.velocities) == len(self.scheduler.timesteps):
            self.latents, self.velocities = [], []
        signal = self.scheduler.alphas_cumprod[int(timestep)].double()
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        flow = self.scheduler.config.prediction_type == "v_prediction"
        latent, output = sample.double() / (alpha + sigma), model_output.double()
        self.latents.append(latent)
        if self.nodes is None or len(self.velocities) in self.nodes:
            noise = alpha * output + sigma * sample if flow else output
            self.velocities.append(noise - (sample - sigma * noise) / alpha)
        else:
            velocity = mean_velocity(self.latents, self.velocities, self.times(), self.windows[len(self.velocities)])
            self.velocities.append(velocity)
            time = sigma / (alpha + sigma)
            noise, clean = latent + (1 - time) * velocity, latent - time * velocity
            model_output = (alpha * noise - sigma * clean if flow else noise).to(sample.dtype)
        return self._original(model_output, timestep, sample, **options)

    def plan(self, evaluations: int, power: float) -> list[int]:
        """Place the evaluations by the generation that was recorded."""
        times = self.times()
        velocities = torch.stack(self.velocities).flatten(1)
        path = torch.stack(self.latents).flatten(1)
        path = torch.cat([path, path[-1:] + velocities[-1:] * (times[-1] - times[-2])])
        nodes, self.windows = shortest_path(deviations(path, velocities, times), evaluations, power)
        self.nodes = frozenset(nodes)
        self.latents, self.velocities = [], []
        return nodes


def mean_velocity_peers(steps: int, counts: list[int]) -> Iterator[Peer]:
    """List MeanCache's rows: one for every number of evaluations and power."""

    def attach(subject: Subject, count: int, power: float) -> Attached:
        watched = MeanVelocity(subject.pipeline.scheduler)
        subject.calibrate()
        nodes = watched.plan(count, power)
        StepCache(subject.transformer, subject.steps, nodes, Polynomial(0))
        return Attached(details=lambda: {"evaluated": nodes, "windows": watched.windows})

    for count in counts:
        for power in POWERS:
            settings = {"evaluations": count, "power": power}
            name = f"MeanCache's scheme, power {power:g}, {count} of {steps}"
            yield Peer(name, "MeanCache's scheme", settings, functools.partial(attach, count=count, power=power))
