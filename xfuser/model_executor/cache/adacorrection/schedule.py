"""How densely whole steps are refreshed along a generation."""

from __future__ import annotations

import math

# An early error is carried, and amplified, through all later steps. Measured on tiny-dit (one step's blocks stood in
# for, all others evaluated; DDIM, 20 and 50 steps), the squared error that a gap of g steps at position u of the
# generation leaves in the image falls about as exp(-18·u) up to half of it, is level from there on, and grows with g³.
# Σ over the gaps is least where the refreshes per step follow the third root of that, exp(-6·u), then level. Long gaps
# cost more than g³ says, so the level part begins a little earlier (between 0.35 and 0.45 it makes little difference),
# and the less is spent, the longer the gaps are and the more evenly they have to lie.
STEEPNESS = 6.0
SETTLED = 0.4
EVEN, STEEP = 2.0, 8.0  # steepness = EVEN + STEEP · share, at most STEEPNESS


def density(step: int, num_steps: int, share: float) -> float:
    """Refreshes per step at a step, up to a common factor, where this share of all evaluations is spent."""
    steepness = min(STEEPNESS, EVEN + STEEP * share)
    return math.exp(-steepness * min(step / num_steps, SETTLED))


def refresh_rates(position: int, steps_left: int, num_steps: int, affordable: float, share: float) -> list[float]:
    """Refreshes per step, for the steps still to come, that add up to what is affordable.

    The rates follow `density`, and are 1 where that would ask for more than every step.

    Args:
        position: Index of the first of these steps.
        steps_left: How many there are.
        num_steps: Steps of the whole generation.
        affordable: Whole-step evaluations left for them, at least 0.
        share: The share of all block evaluations that the whole generation spends.

    Returns:
        ``steps_left`` rates between 0 and 1.
    """
    if affordable >= steps_left:
        return [1.0] * steps_left
    shape = [density(position + index, num_steps, share) for index in range(steps_left)]
    rest = sum(shape)
    for full, value in enumerate(shape):
        # The density never rises, so the steps that are refreshed for certain are the first ones.
        scale = (affordable - full) / rest
        if scale * value <= 1:
            return [1.0] * full + [scale * each for each in shape[full:]]
        rest -= value
    return [1.0] * steps_left
