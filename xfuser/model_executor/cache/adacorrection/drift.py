"""How unusual the drift of this step is: what the error estimate is warned of before anything is evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass

# An offset score is a squared drift; an error is linear in it.
EXPONENT = 0.5
MEMORY = 0.8  # share of the old value in the running mean


@dataclass
class DriftMonitor:
    """Compares the offset score S with what is usual at its lag, S ∝ lag²."""

    usual: float = math.nan

    def ratio(self, score: float, lag: int) -> float:
        """By how much to scale a predicted error: 1 for the usual drift, √2 for twice the usual score."""
        if not math.isfinite(score) or score <= 0 or lag <= 0:
            return 1.0
        per_step = score / lag**2
        if math.isnan(self.usual):
            self.usual = per_step
        ratio = (per_step / self.usual) ** EXPONENT
        self.usual = MEMORY * self.usual + (1 - MEMORY) * per_step
        return ratio
