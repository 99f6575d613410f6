"""Place the evaluations: dynamic programming over the Gram matrix of one recorded generation, without a model call.

Between two evaluated steps b < c nothing is evaluated, so what counts is how well the jump x_c - x_b lies in the span
of what is remembered at b: the newest evaluated outputs of each branch, and x_b. The squared distance is a function of
inner products alone. Only the newest three evaluated steps are a state, and gaps between them are bounded, so memory is
steps · gaps² · kinds · budgets numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from xfuser.model_executor.cache.adacorrection.trajectory.plan import CONDITIONAL, FULL, SKIP, Plan

Steps = TypeVar("Steps", int, np.ndarray)
RIDGE = 1e-6  # of the features' mean square, as in the fit
LARGEST_GAP = 24
SMALLEST_GAP = 6
AT_ONCE = 4096  # jumps that are solved at once
# What was evaluated at the newest three steps, newest first: never two conditional branches alone in a row.
KINDS = ((FULL, FULL, FULL), (FULL, FULL, CONDITIONAL), (FULL, CONDITIONAL, FULL), (CONDITIONAL, FULL, FULL))
KINDS += ((CONDITIONAL, FULL, CONDITIONAL),)


@dataclass(frozen=True)
class Gram:
    """Inner products of a generation's latents and outputs, summed over images and elements.

    Attributes:
        matrix: Shape [N, N], float64; first the latents x_0 … x_T, then the branches' outputs m_0 … m_{T-1} in turn.
        steps: T.
        branches: 1, or 2 with guidance: conditional outputs, then unconditional ones.
    """

    matrix: np.ndarray
    steps: int
    branches: int

    def __post_init__(self) -> None:
        expected = self.steps + 1 + self.branches * self.steps
        if self.matrix.shape != (expected, expected):
            raise ValueError(f"a Gram matrix of {self.steps} steps has {expected} rows, not {self.matrix.shape[0]}")

    def output(self, branch: int, step: Steps) -> Steps:
        """Find the row of an output, or those of several steps."""
        return self.steps + 1 + branch * self.steps + step


def even_placement(steps: int, evaluations: int) -> Plan:
    """Space full evaluations evenly, the first step among them."""
    if not 1 <= evaluations <= steps:
        raise ValueError(f"{evaluations} evaluations of {steps} steps: expected 1 to {steps}")
    return Plan.at(steps, [math.floor(index * steps / evaluations) for index in range(evaluations)])


def jump_residuals(gram: Gram, nodes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Compute how far jumps lie outside the span of what is remembered.

    Args:
        gram: The recorded generation.
        nodes: Per jump, the rows of remembered outputs, [M, K].
        starts: Per jump, the step it starts from, [M].
        ends: The steps where it may end, [M, E].

    Returns:
        The squared distances, [M, E].
    """
    matrix, nodes = gram.matrix, np.asarray(nodes)
    features = np.concatenate([nodes, starts[:, None]], axis=1).T  # jumps come last: all are eliminated at once
    count = len(features)
    inner = matrix[features[:, None], features[None]]
    # Each direction counts by its own size: outputs and latents differ by orders of magnitude.
    scale = np.sqrt(np.maximum(np.einsum("kkm->km", inner), np.finfo(float).tiny))
    inner = inner / (scale[:, None] * scale[None]) + RIDGE * np.eye(count)[:, :, None]
    target = matrix[features[:, None], ends.T[None]] - matrix[features, starts][:, None]
    target = target / scale[:, None]
    outside = matrix[ends, ends] - 2 * matrix[ends, starts[:, None]] + matrix[starts, starts][:, None]
    for place in range(count):  # no pivots: the matrices are positive definite, by the ridge
        pivot = inner[place, place]
        outside = outside - (np.square(target[place]) / pivot).T
        factors = inner[place + 1 :, place] / pivot
        inner[place + 1 :, place + 1 :] -= factors[:, None] * inner[place, place + 1 :]
        target[place + 1 :] -= factors[:, None] * target[place]
    return np.maximum(outside, 0.0)


class Scheduler:
    """Finds the best plan for every budget at once.

    Args:
        gram: The recorded generation.
        branches_apart: Whether a step may evaluate the conditional branch alone.
        largest_gap: Steps between two evaluations, at most; more where the largest budget needs it.
        largest_budget: Half evaluations up to which plans can be read; by default all.
        emphasis: How much more an early jump's residual counts than a late one's, since what comes after may amplify
            it: the power of the share of steps that are still to come. 0 counts all alike.
    """

    def __init__(
        self,
        gram: Gram,
        branches_apart: bool = False,
        largest_gap: int = LARGEST_GAP,
        largest_budget: int | None = None,
        emphasis: float = 0.0,
    ) -> None:
        if branches_apart and gram.branches != 2:
            raise ValueError("one branch cannot be evaluated apart from another")
        self.gram = gram
        self._emphasis = emphasis
        self._budgets = min(largest_budget or FULL * gram.steps, FULL * gram.steps) + 1
        needed = math.ceil(gram.steps / max(1, (self._budgets - 1) // FULL))
        self.gap = min(max(largest_gap, needed), gram.steps)
        self.kinds = KINDS if branches_apart else KINDS[:1]
        self._solve()

    @classmethod
    def of(cls, gram: Gram, budget: int, branches_apart: bool, emphasis: float = 0.0) -> Scheduler:
        """Make one whose gaps are bounded by two and a half times a budget's mean gap, all that good plans need."""
        mean_gap = FULL * gram.steps / budget
        return cls(
            gram, branches_apart, min(max(math.ceil(2.5 * mean_gap), SMALLEST_GAP), LARGEST_GAP), budget, emphasis
        )

    def plan(self, budget: int) -> Plan:
        """Read the best plan.

        Args:
            budget: Half evaluations that may be spent, at least 2.

        Raises:
            ValueError: So few cannot be placed with the largest gap.
        """
        units = budget if len(self.kinds) > 1 else budget - budget % FULL
        units = min(units, self._budgets - 1)
        if units < FULL or not np.isfinite(self._end[: units + 1]).any():
            raise ValueError(f"{budget / FULL:g} evaluations of {self.gram.steps} steps are too few to be placed")
        # What may be spent is spent: with a stochastic scheduler the noise in every jump can hide what it brings.
        spent = max(FULL, units - 1) + int(np.argmin(self._end[max(FULL, units - 1) : units + 1]))
        if not np.isfinite(self._end[spent]):
            spent = int(np.flatnonzero(np.isfinite(self._end[: units + 1]))[-1])
        return self._read(spent)

    # -- dynamic programming ------------------------------------------------------------------------------------------

    def _solve(self) -> None:
        """Find the least residual with which each state is reached, by what was spent on it."""
        steps, gap, kinds = self.gram.steps, self.gap, self.kinds
        budgets = self._budgets
        self._costs = [self._costs_of(kind) for kind in kinds]
        # Gap 0 means that there is no such node yet. Budgets come last: they are what is added and compared at once.
        self._best = np.full((steps, len(kinds), gap + 1, gap + 1, budgets), np.inf, dtype=np.float32)
        self._end = np.full(budgets, np.inf, dtype=np.float32)
        self._best[0, 0, 0, 0, FULL] = 0.0
        for step in range(steps):
            ends = np.arange(step + 1, min(step + gap + 1, steps))
            known = slice(1, min(gap, step) + 1) if step else slice(0, 1)
            reached = min(budgets, FULL * (step + 1) + 1)  # no more can have been spent by now
            for kind in range(len(kinds) if step else 1):
                values, costs = self._best[step, kind, known, :, :reached], self._costs[kind][step, known]
                least = np.full((len(values), costs.shape[2], reached), np.inf, dtype=np.float32)
                for second in range(values.shape[1]):
                    np.minimum(least, values[:, second, None] + costs[:, second, :, None], out=least)
                if step + gap >= steps:
                    finished = least[:, steps - step - 1].min(axis=0)
                    np.minimum(self._end[:reached], finished, out=self._end[:reached])
                for follow in (FULL, CONDITIONAL) if len(ends) else ():
                    after = (follow, *kinds[kind][:2])
                    if after in kinds:
                        spendable = min(reached, budgets - follow)
                        cells = (ends, kinds.index(after), ends - step, known, slice(follow, follow + spendable))
                        arrived = least[:, : len(ends), :spendable].swapaxes(0, 1)
                        self._best[cells] = np.minimum(self._best[cells], arrived)

    def _read(self, spent: int) -> Plan:
        """Go back from the end to what led there."""
        found = [SKIP] * self.gram.steps
        step, kind, first, second = self._before(range(max(0, len(found) - self.gap), len(found)), len(found), spent)
        while True:
            found[step] = self.kinds[kind][0]
            if step == 0:
                return Plan(tuple(found))
            spent -= self.kinds[kind][0]
            earlier = [step - first]
            step, kind, first, second = self._before(
                earlier, step, spent, self.kinds[kind][1:], slice(second, second + 1)
            )

    def _before(
        self, steps: Sequence[int], end: int, spent: int, evaluated: tuple[int, ...] = (), firsts: slice = slice(None)
    ) -> tuple[int, int, int, int]:
        """Find the state, of certain ones, from which a step, or the end, is reached best: as `_best` is indexed."""
        found, best = (0, 0, 0, 0), np.inf
        for step in steps:
            for kind, what in enumerate(self.kinds):
                if what[: len(evaluated)] == evaluated:
                    costs = self._costs[kind][step, firsts, :, end - step - 1]
                    total = self._best[step, kind, firsts, :, spent] + costs
                    if total.min() < best:
                        best = total.min()
                        first, second = np.unravel_index(total.argmin(), total.shape)
                        found = step, kind, (firsts.start or 0) + int(first), int(second)
        return found

    def _costs_of(self, kind: tuple[int, ...]) -> np.ndarray:
        """Compute all jumps' residuals as shares of the latents: [steps, gaps + 1, gaps + 1, gaps], else infinite."""
        steps, gap = self.gram.steps, self.gap
        costs = np.full((steps, gap + 1, gap + 1, gap), np.inf, dtype=np.float32)
        whole = float(np.trace(self.gram.matrix[: steps + 1, : steps + 1])) or 1.0
        step, first, second = (each.ravel() for each in np.indices((steps, gap + 1, gap + 1)))
        # A node before the newest one, and one before that, where there can be any.
        some = np.where(step == 0, first == 0, (first > 0) & (first <= step))
        more = (step > first) & (first > 0)
        some &= np.where(more, (second > 0) & (second <= step - first), second == 0)
        # Jumps of as many remembered outputs are solved at once, some thousands at a time.
        for count, chosen in enumerate((step == 0, (step > 0) & ~more, more), start=1):
            places = np.flatnonzero(some & chosen)
            for several in np.array_split(places, math.ceil(len(places) / AT_ONCE) or 1):
                newest = step[several]
                nodes = [newest, newest - first[several], newest - first[several] - second[several]][:count]
                rows = [self.gram.output(0, each) for each in nodes]
                if self.gram.branches == 2:
                    evaluated = zip(nodes, kind, strict=False)
                    rows += [self.gram.output(1, each) for each, what in evaluated if what == FULL]
                ends = newest[:, None] + np.arange(1, gap + 1)
                residuals = jump_residuals(self.gram, np.stack(rows, axis=1), newest, np.minimum(ends, steps))
                shares = residuals * (((steps - newest) / steps) ** self._emphasis / whole)[:, None]
                costs[newest, first[several], second[several]] = np.where(ends <= steps, shares, np.inf)
        return costs
