"""What stands in for a block: weights on its remembered residuals.

With residuals r_1, r_2, … of the steps u_1 > u_2 > … at which a block was last evaluated, the stand-in at step u for an
input h is h + Σ_j c_j r_j. Every approximation is one choice of the weights c, so a correction can act on them alone.
"""

from __future__ import annotations

from collections.abc import Sequence

# "activation" is the remembered output itself (the paper's cached branch): it ignores the input.
ORDERS = {"activation": 0, "residual": 0, "taylor-1": 1, "taylor-2": 2}


def history_length(approximation: str) -> int:
    """How many evaluated steps an approximation reads."""
    return ORDERS[approximation] + 1


def extrapolation_weights(
    step: float, nodes: Sequence[float], order: int, correction: float = 1.0
) -> tuple[float, ...]:
    """Weights of the residuals evaluated at ``nodes`` (newest first) for an extrapolation to ``step``.

    Order p takes the polynomial through the newest p + 1 nodes (Lagrange weights; for p = 1 the secant of TaylorSeer,
    arXiv 2503.06923, with its true, not its average, spacing). ``correction`` scales the extrapolating part: 0 is plain
    reuse of the newest residual, 1 the full polynomial.

    Args:
        step: The step to extrapolate to, in denoising steps.
        nodes: Steps of the remembered evaluations, newest first, at least one, all different.
        order: Wanted order; fewer nodes than order + 1 lower it.
        correction: Correction weight, without unit.

    Returns:
        One weight a node used, newest first; they add up to 1.
    """
    used = list(nodes[: order + 1])
    weights = []
    for j, node in enumerate(used):
        product = 1.0
        for m, other in enumerate(used):
            if m != j:
                product *= (step - other) / (node - other)
        weights.append(product * correction)
    weights[0] += 1.0 - correction
    return tuple(weights)


def remainder(step: float, nodes: Sequence[float], order: int) -> float:
    """The lag's part of the interpolation error, Π_j (u − u_j) / (p + 1)!, in steps to the power p + 1."""
    product = 1.0
    for index, node in enumerate(nodes[: order + 1]):
        product *= (step - node) / (index + 1)
    return abs(product)
