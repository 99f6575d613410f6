"""The plan of a step: for every unit, evaluate it or let an approximation stand in, and with which weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """The decisions of one step.

    Attributes:
        evaluate: Per unit, whether it is evaluated.
        weights: Per unit, the correction weight of its stand-in: how much of the extrapolating part is believed.
    """

    evaluate: tuple[bool, ...]
    weights: tuple[float, ...]

    @classmethod
    def whole(cls, units: int, evaluate: bool, weight: float = 1.0) -> StepPlan:
        return cls((evaluate,) * units, (weight,) * units)

    def with_prefix(self, evaluated: int) -> StepPlan:
        """The same plan with its first ``evaluated`` units evaluated, as they have been already."""
        return StepPlan((True,) * evaluated + self.evaluate[evaluated:], self.weights)

    @property
    def evaluates_all(self) -> bool:
        return all(self.evaluate)
