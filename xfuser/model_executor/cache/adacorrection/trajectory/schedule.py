"""Place the evaluations: dynamic programming over the Gram matrix of one recorded generation, without a model call.

Between two evaluated steps b < c nothing is evaluated, so what counts is how well the jump x_c - x_b lies in the span
of what is remembered at b: the newest evaluated outputs of each branch, and x_b. The squared distance is a function of
inner products alone. Only the newest three evaluated steps are a state, and gaps between them are bounded, so memory is
steps · gaps² · kinds · budgets numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from xfuser.model_executor.cache.adacorrection.trajectory.plan import CONDITIONAL, FULL, SKIP, Plan

Steps = TypeVar("Steps", int, np.ndarray)
RIDGE = 1e-6  # of the features' mean square, as in the fit
LARGEST_GAP = 24
SMALLEST_GAP = 6
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
    matrix = gram.matrix
    features = np.concatenate([nodes, starts[:, None]], axis=1)
    inner = matrix[features[:, :, None], features[:, None, :]]
    count = features.shape[1]
    # Each direction counts by its own size: outputs and latents differ by orders of magnitude.
    scale = np.sqrt(np.maximum(np.einsum("mkk->mk", inner), np.finfo(float).tiny))
    inner = inner / (scale[:, :, None] * scale[:, None, :]) + RIDGE * np.eye(count)
    target = matrix[features[:, :, None], ends[:, None, :]] - matrix[features, starts[:, None]][:, :, None]
    target = target / scale[:, :, None]
    size = matrix[ends, ends] - 2 * matrix[ends, starts[:, None]] + matrix[starts, starts][:, None]
    weights = np.linalg.solve(inner, target)
    return np.maximum(size - np.einsum("mke,mke->me", weights, target), 0.0)


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
        kinds = [SKIP] * self.gram.steps
        state = self._last[spent]
        while True:
            step, kind, first, second = (int(each) for each in np.unravel_index(state, self._shape))
            newest = self.kinds[kind][0]
            kinds[step] = newest
            if step == 0:
                return Plan(tuple(kinds))
            came_from = self._came[step, kind, first, second, spent]
            spent -= newest
            state = came_from

    # -- dynamic programming ------------------------------------------------------------------------------------------

    def _solve(self) -> None:
        steps, gap, kinds = self.gram.steps, self.gap, self.kinds
        budgets = self._budgets
        # Gap 0 means that there is no such node yet. Budgets come last: they are what is added and compared at once.
        self._shape = (steps, len(kinds), gap + 1, gap + 1)
        best = np.full((*self._shape, budgets), np.inf, dtype=np.float32)
        self._came = np.full((*self._shape, budgets), -1, dtype=np.int32)
        self._end = np.full(budgets, np.inf)
        self._last = np.full(budgets, -1, dtype=np.int64)
        self._scale = float(np.trace(self.gram.matrix[: steps + 1, : steps + 1])) or 1.0
        best[0, 0, 0, 0, FULL] = 0.0
        successors = {
            (kind, follow): kinds.index((follow, *kinds[kind][:2]))
            for kind in range(len(kinds))
            for follow in (FULL, CONDITIONAL)
            if (follow, *kinds[kind][:2]) in kinds
        }
        for step in range(steps):
            ends = np.arange(step + 1, min(step + gap, steps) + 1)
            firsts = np.arange(1, min(gap, step) + 1) if step else np.array([0])
            known = slice(int(firsts[0]), int(firsts[-1]) + 1)
            reached = min(budgets, FULL * (step + 1) + 1)  # no more can have been spent by now
            for kind in range(len(kinds)):
                if step == 0 and kind > 0:
                    continue
                costs = self._costs(step, kind, firsts, ends)
                origins = np.ravel_multi_index((step, kind, firsts, 0), self._shape)
                values = best[step, kind, known, :, :reached]  # firsts, seconds, budgets
                for place, end in enumerate(ends):
                    total = values + costs[:, :, place, None]
                    chosen = total.argmin(axis=1)
                    least = total.min(axis=1)
                    origin = origins[:, None] + chosen
                    if end == steps:
                        self._finish(least, origin)
                        continue
                    for follow in (FULL, CONDITIONAL):
                        after = successors.get((kind, follow))
                        if after is None:
                            continue
                        spendable = min(reached, budgets - follow)
                        later = slice(follow, follow + spendable)
                        cells = best[end, after, end - step, known, later]
                        better = least[:, :spendable] < cells
                        np.copyto(cells, least[:, :spendable], where=better)
                        np.copyto(self._came[end, after, end - step, known, later], origin[:, :spendable], where=better)

    def _finish(self, total: np.ndarray, origin: np.ndarray) -> None:
        chosen = total.argmin(axis=0)
        least = total.min(axis=0)
        better = np.flatnonzero(least < self._end[: len(least)])
        self._end[better] = least[better]
        self._last[better] = origin[chosen[better], better]

    def _costs(self, step: int, kind: int, firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Compute all jumps' residuals as shares of the latents, [firsts, gaps + 1, ends]; infinite where none is."""
        costs = np.full((len(firsts), self.gap + 1, len(ends)), np.inf, dtype=np.float32)
        share_to_come = (self.gram.steps - step) / self.gram.steps
        # Jumps of as many remembered outputs are solved at once. Kinds that never come up keep infinite values.
        groups: dict[bool, list[tuple[int, int]]] = {}
        for place, first in enumerate(firsts):
            middle = step - int(first)
            seconds = range(1, min(self.gap, middle) + 1) if first and middle else range(1)
            groups.setdefault(bool(first and middle), []).extend((place, second) for second in seconds)
        for known, pairs in groups.items():
            places, seconds_of = np.array(pairs).T
            middle = step - firsts[places]
            steps = [np.full(len(pairs), step), middle, middle - seconds_of]
            # Two steps where the first one is the one before last, one at the first itself.
            steps = steps if known else steps[: 2 if step else 1]
            rows = [self.gram.output(0, each) for each in steps]
            if self.gram.branches == 2:
                evaluated = zip(steps, self.kinds[kind], strict=False)
                rows += [self.gram.output(1, each) for each, what in evaluated if what == FULL]
            where = np.broadcast_to(ends, (len(pairs), len(ends)))
            found = jump_residuals(self.gram, np.stack(rows, axis=1), steps[0], where)
            costs[places, seconds_of] = found * (share_to_come**self._emphasis / self._scale)
        return costs
