"""What stands in for a block: weights on its remembered residuals.

With residuals r_1, r_2, … of the steps u_1 > u_2 > … at which a block was last evaluated, the stand-in at step u for an
input h is h + Σ_j c_j r_j. Every approximation is one choice of the weights c, so a correction can act on them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

# "activation" is the remembered output itself (the paper's cached branch): it ignores the input. "fitted" takes its
# weights from a calibration, and these until there is one.
ORDERS = {"activation": 0, "residual": 0, "linear": 0, "taylor-1": 1, "taylor-2": 2, "fitted": 2}


class Extrapolation:
    """Weights of the polynomial through the newest evaluations: those of every block alike.

    Attributes:
        order: How many evaluations beyond the newest one are read.
        shared: Whether all blocks have the same weights, so that the stand-ins of neighbours merge into one.
    """

    shared: ClassVar[bool] = True

    def __init__(self, order: int) -> None:
        self.order = order

    def pair(self, row: int, step: int, nodes: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Weights of the remembered residuals without what the correction weight scales, and with all of it."""
        if not nodes:
            return (), ()
        return extrapolation_weights(step, nodes, self.order, 0.0), extrapolation_weights(step, nodes, self.order)

    def weights(self, row: int, step: int, nodes: Sequence[int], correction: float) -> tuple[float, ...]:
        """Weights of the remembered residuals, newest first; ``row`` is a block, or the run behind the probed ones."""
        return extrapolation_weights(step, nodes, self.order, correction)

    def expectation(self, row: int, step: int, nodes: Sequence[int]) -> tuple[float, int]:
        """What the stand-in's error is proportional to, and the order that the history allows (-1 without one)."""
        order = min(self.order, len(nodes) - 1)
        return (remainder(step, nodes, order) if nodes else 0.0), order


def lagrange_weights(step: float, nodes: Sequence[float]) -> tuple[float, ...]:
    """Weights of the values at ``nodes`` in the polynomial through all of them, taken at ``step``; they add up to 1."""
    weights = []
    for j, node in enumerate(nodes):
        product = 1.0
        for m, other in enumerate(nodes):
            if m != j:
                product *= (step - other) / (node - other)
        weights.append(product)
    return tuple(weights)


def extrapolation_weights(
    step: float, nodes: Sequence[float], order: int, correction: float = 1.0
) -> tuple[float, ...]:
    """Weights of the residuals evaluated at ``nodes`` (newest first) for an extrapolation to ``step``.

    Order p takes the polynomial through the newest p + 1 nodes (for p = 1 the secant of TaylorSeer, arXiv 2503.06923,
    with the nodes' true spacing). ``correction`` scales its highest term: 0 is the polynomial of order p − 1, 1 the
    full one.

    Args:
        step: The step to extrapolate to, in denoising steps.
        nodes: Steps of the remembered evaluations, newest first, at least one, all different.
        order: Wanted order; fewer nodes than order + 1 lower it, and leave nothing to correct.
        correction: Correction weight, without unit.

    Returns:
        One weight a node used, newest first; they add up to 1.
    """
    used = nodes[: order + 1]
    full = lagrange_weights(step, used)
    if correction == 1.0 or order == 0 or len(used) <= order:
        return full
    lower = (*lagrange_weights(step, used[:-1]), 0.0)
    return tuple(b + correction * (a - b) for a, b in zip(full, lower, strict=True))


def remainder(step: float, nodes: Sequence[float], order: int) -> float:
    """The lag's part of the interpolation error, Π_j (u − u_j) / (p + 1)!, in steps to the power p + 1."""
    product = 1.0
    for index, node in enumerate(nodes[: order + 1]):
        product *= (step - node) / (index + 1)
    return abs(product)
