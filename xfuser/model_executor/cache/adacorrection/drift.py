"""How unusual the drift of this step is: what the error estimate is warned of before anything is evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# An offset score is a squared drift; an error is linear in it.
EXPONENT = 0.5
MEMORY = 0.8  # share of the old value in the running mean
# How far one step's drift may move what is expected of it. The spatial part of a relative score is a difference that
# passes through 0 without anything having come to rest, and the first step's score is no measure of those that follow.
LEAST, MOST = 0.5, 2.0


def bounded(factor: float) -> float:
    """The factor, no further from 1 than `LEAST` and `MOST`."""
    return min(max(factor, LEAST), MOST)


@dataclass
class DriftMonitor:
    """Compares the offset score S with what has been usual at the same lag."""

    usual: dict[int, float] = field(default_factory=dict)

    def ratio(self, score: float, lag: int) -> float:
        """By how much to scale a predicted error: 1 for the usual drift, √2 for twice the usual score."""
        if not math.isfinite(score) or score <= 0 or lag <= 0:
            return 1.0
        usual = self.usual.setdefault(lag, score)
        self.usual[lag] = MEMORY * usual + (1 - MEMORY) * score
        return (score / usual) ** EXPONENT
