"""How densely whole steps are refreshed along a generation."""

from __future__ import annotations

import math

# The gap between refreshes grows by exp(DECAY) over a generation. An early error is carried through all later steps: a
# sampler x ← a·x + b·ε̂(x) multiplies it by |a| + |b|·K at each, so what may be tolerated grows with the step.
DECAY = 2.0
BISECTIONS = 40


def refresh_rates(position: float, steps_left: int, num_steps: int, affordable: float) -> list[float]:
    """Refreshes per step, for the steps still to come, that add up to what is affordable.

    The rate falls as exp(−DECAY · step / num_steps), and is 1 where that would ask for more than every step.

    Args:
        position: Index of the first of these steps.
        steps_left: How many there are.
        num_steps: Steps of the whole generation.
        affordable: Whole-step evaluations left for them, at least 0.

    Returns:
        ``steps_left`` rates between 0 and 1.
    """
    shape = [math.exp(-DECAY * (position + index) / num_steps) for index in range(steps_left)]
    if affordable >= steps_left:
        return [1.0] * steps_left
    low, high = 0.0, 1.0 / shape[-1] if shape else 0.0
    for _ in range(BISECTIONS):
        scale = (low + high) / 2
        if sum(min(1.0, scale * value) for value in shape) < affordable:
            low = scale
        else:
            high = scale
    return [min(1.0, high * value) for value in shape]
