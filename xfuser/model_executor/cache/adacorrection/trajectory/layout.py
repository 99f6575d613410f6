"""What a pipeline's step looks like: which branches its calls make, and how their outputs lie beside its latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xfuser.model_executor.cache.adacorrection.trajectory.branches import Branch, Slot


@dataclass(frozen=True)
class Layout:
    """The form of one step, found at a generation's first one.

    Attributes:
        calls: Calls of denoisers in every step.
        doubled: The scheduler steps every image twice, once a half of the batch (as `DiTPipeline` has it).
        places: (call, half) of the branches whose outputs are features: conditional first. Empty where the output that
            the scheduler receives stands for them.
        halves: The branches come in one batch.
    """

    calls: int
    doubled: bool
    places: tuple[tuple[int, int], ...]
    halves: bool

    @property
    def branches(self) -> int:
        return max(1, len(self.places))

    def fold(self, latents: torch.Tensor) -> torch.Tensor:
        """Leave one of two equal halves."""
        return latents.chunk(2)[0] if self.doubled else latents

    def unfold(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([latents, latents]) if self.doubled else latents

    def branch(self, slots: list[Slot], index: int) -> Branch:
        """Find a branch among a step's calls."""
        call, half = self.places[index]
        return slots[call].branches[half]

    def swapped(self) -> Layout:
        """Take the second branch for the conditional one."""
        return Layout(self.calls, self.doubled, self.places[::-1], self.halves)


def find_layout(slots: list[Slot], sample: torch.Tensor, output: torch.Tensor) -> Layout:
    """Find the layout at a generation's first step.

    Args:
        slots: The step's calls, whose batches have not been split yet.
        sample: The latent that the scheduler receives.
        output: The model output that it receives.
    """
    raw = [slot.branches[0].outputs[0][1] for slot in slots if slot.branches]
    doubled = len(raw) == 1 and _is_doubled(raw[0], sample, output)
    latents = sample.chunk(2)[0] if doubled else sample
    places: tuple[tuple[int, int], ...] = ()
    halves = False
    if len(raw) == len(slots):
        if len(raw) == 1 and raw[0].ndim and raw[0].shape[0] == 2 * latents.shape[0]:
            halves = True
            places = ((0, 0), (0, 1))
        elif len(raw) <= 2 and all(each.ndim and each.shape[0] == latents.shape[0] for each in raw):
            places = tuple((call, 0) for call in range(len(raw)))
        if not all(fits(each, latents) for each in raw):
            places = ()
    return Layout(len(slots), doubled, places, halves)


def beside(output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Cut what a denoiser returns to the latent's form: a learned variance or appended tokens are left out."""
    for dim in range(1, latents.ndim):
        output = output.narrow(dim, 0, latents.shape[dim])
    return output


def fits(output: torch.Tensor, latents: torch.Tensor) -> bool:
    """Whether an output has the latent's form, or can be cut to it."""
    return (
        output.ndim == latents.ndim
        and all(a >= b for a, b in zip(output.shape[1:], latents.shape[1:], strict=True))
        and output.is_floating_point()
    )


def _is_doubled(raw: torch.Tensor, sample: torch.Tensor, output: torch.Tensor) -> bool:
    if sample.ndim == 0 or sample.shape[0] % 2 or raw.shape[0] != sample.shape[0] or output.shape[0] != sample.shape[0]:
        return False
    halves = sample.chunk(2), output.chunk(2), raw.chunk(2)
    same = [torch.equal(first, second) for first, second in halves]
    return same[0] and same[1] and not same[2]
