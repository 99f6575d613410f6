"""Which steps evaluate the denoiser, and how much of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

SKIP, CONDITIONAL, FULL = 0, 1, 2
NODES = 3  # outputs of a branch that are remembered


@dataclass(frozen=True)
class Plan:
    """What is evaluated at each step of a generation.

    Attributes:
        kinds: One of `SKIP`, `CONDITIONAL` (one branch of guidance, at half the cost) and `FULL` for every step.
    """

    kinds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.kinds or self.kinds[0] != FULL:
            raise ValueError("a plan evaluates everything at its first step")

    @classmethod
    def full(cls, steps: int) -> Plan:
        return cls((FULL,) * steps)

    @classmethod
    def at(cls, steps: int, evaluated: Sequence[int]) -> Plan:
        """Make a plan that evaluates everything at some steps and nothing at the others."""
        chosen = set(evaluated)
        return cls(tuple(FULL if step in chosen else SKIP for step in range(steps)))

    @property
    def steps(self) -> int:
        return len(self.kinds)

    @property
    def cost(self) -> float:
        """The share of all denoiser evaluations, where a conditional branch alone counts half."""
        return sum(self.kinds) / (FULL * self.steps)

    @property
    def is_full(self) -> bool:
        return all(kind == FULL for kind in self.kinds)

    @property
    def digest(self) -> str:
        return hashlib.sha256(bytes(self.kinds)).hexdigest()

    def strip(self) -> str:
        """Draw one character a step: a full block, a half one, or a dot for a skipped step."""
        return "".join({SKIP: "·", CONDITIONAL: "▄", FULL: "█"}[kind] for kind in self.kinds)
