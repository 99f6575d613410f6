"""One full generation, as the scheduler received it: what plans and weights are learned from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from xfuser.model_executor.cache.adacorrection.trajectory.layout import Layout
from xfuser.model_executor.cache.adacorrection.trajectory.schedule import Gram

COLUMNS = 1 << 20  # elements of every latent that are multiplied at once


@dataclass
class Recording:
    """Latents and outputs of every step, on the CPU.

    Attributes:
        layout: The form of a step.
        timesteps: Of every step.
        latents: x_0 … x_T, [B, …] each.
        outputs: Per branch, m_0 … m_{T-1}, in the latent's form.
        guidance: Inner products of the two branches' outputs and what the scheduler received, which show which branch
            is the conditional one.
        raw: Per step, what each call returned, where a replay is to do without the denoiser.
        denoiser_seconds: Per step.
        step_seconds: Per step, with all that is outside the denoiser, less the recording itself.
        correction_seconds: Per step, what forecast and correction would add to it.
    """

    layout: Layout
    timesteps: list[float] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    outputs: list[list[torch.Tensor]] = field(default_factory=list)
    guidance: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    raw: list[list[torch.Tensor]] = field(default_factory=list)
    denoiser_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    correction_seconds: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return max(0, len(self.latents) - 1)

    @property
    def images(self) -> int:
        return self.latents[0].shape[0]

    def add(self, timestep: float, latents: torch.Tensor, outputs: list[torch.Tensor], guided: torch.Tensor) -> None:
        """Take in one step: its timestep and latent, its branches' outputs and what the scheduler receives."""
        self.timesteps.append(timestep)
        self.latents.append(_kept(latents))
        for branch, output in enumerate(outputs):
            if len(self.outputs) <= branch:
                self.outputs.append([])
            self.outputs[branch].append(_kept(output))
        if len(outputs) == 2:
            rows = np.stack([each.detach().float().cpu().flatten().numpy() for each in (*outputs, guided)])
            self.guidance += rows @ rows.T

    def finish(self, latents: torch.Tensor) -> None:
        """Take in what the last step gave, as the scheduler has it."""
        self.latents.append(_kept(self.layout.fold(latents)))
        self._order_branches()

    def _order_branches(self) -> None:
        """Put the conditional branch first: guidance u + s (c - u) with s > 0.5 gives it the larger share."""
        if self.layout.branches != 2:
            return
        inner, target = self.guidance[:2, :2], self.guidance[:2, 2]
        ridge = 1e-9 * max(float(np.trace(inner)), np.finfo(float).tiny)
        first, second = np.linalg.solve(inner + ridge * np.eye(2), target)
        if second > first:
            self.layout = self.layout.swapped()
            self.outputs.reverse()

    def gram(self) -> Gram:
        """Multiply everything with everything."""
        rows = [*self.latents, *(output for branch in self.outputs for output in branch)]
        total = np.zeros((len(rows), len(rows)))
        elements = rows[0].numel()
        flat = [row.reshape(-1) for row in rows]
        for start in range(0, elements, COLUMNS):
            block = torch.stack([row[start : start + COLUMNS].double() for row in flat])
            total += (block @ block.T).numpy()
        return Gram(total, self.steps, len(self.outputs))


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def add_grams(known: Gram | None, new: Gram) -> Gram:
    """Add another generation's inner products."""
    return new if known is None else Gram(known.matrix + new.matrix, new.steps, new.branches)


def pixels_of(result: Any) -> tuple[np.ndarray, float] | None:
    """Read the images in what a pipeline returned: [B, …] and their range, or ``None`` where nothing is readable."""
    value = result
    for name in ("images", "frames", "audios", "videos"):
        if hasattr(result, name):
            value = getattr(result, name)
            break
    else:
        value = result[0] if isinstance(result, (tuple, list)) and len(result) else result
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    if not isinstance(value, (np.ndarray, list, tuple)) or len(value) == 0:
        return None
    try:
        array = np.asarray([_pixels(each) for each in value])
    except ValueError:  # of different sizes
        return None
    if array.dtype == object:
        return None
    return array.astype(np.float32), 255.0 if array.dtype == np.uint8 else 1.0


def _pixels(value: Any) -> np.ndarray:
    if isinstance(value, (list, tuple)):
        return np.asarray([_pixels(each) for each in value])
    return value.detach().float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
