"""The dynamic program against all plans, the fit against weights that are known, and shrinkage by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from xfuser.model_executor.cache.adacorrection.trajectory.goals import speedup_of
from xfuser.model_executor.cache.adacorrection.trajectory.plan import CONDITIONAL, FULL, SKIP, Plan
from xfuser.model_executor.cache.adacorrection.trajectory.schedule import (
    Gram,
    Scheduler,
    even_placement,
    jump_residuals,
)
from xfuser.model_executor.cache.adacorrection.trajectory.weights import NormalEquations, difference_basis

STEPS = 7


@pytest.fixture(scope="module")
def gram() -> Gram:
    rows = np.random.default_rng(0).normal(size=(3 * STEPS + 1, 40)).cumsum(0)
    return Gram(rows @ rows.T, STEPS, 2)


def cost(gram: Gram, plan: Plan) -> float:
    """Sum a plan's jumps one by one, as the module's description has it."""
    evaluated = [step for step, kind in enumerate(plan.kinds) if kind]
    total = 0.0
    for place, step in enumerate(evaluated):
        newest = evaluated[max(0, place - 2) : place + 1][::-1]
        rows = [gram.output(0, each) for each in newest]
        rows += [gram.output(1, each) for each in newest if plan.kinds[each] == FULL]
        end = evaluated[place + 1] if place + 1 < len(evaluated) else gram.steps
        total += float(jump_residuals(gram, [tuple(rows)], np.array([step]), np.array([[end]]))[0, 0])
    return total


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("budget", [4, 6, 8])
def test_the_plan_is_the_best_of_all(gram: Gram, apart: bool, budget: int) -> None:
    kinds = (SKIP, CONDITIONAL, FULL) if apart else (SKIP, FULL)
    plans = [Plan((FULL, *rest)) for rest in itertools.product(kinds, repeat=STEPS - 1)]
    evaluated = [[kind for kind in plan.kinds if kind] for plan in plans]
    allowed = [
        plan
        for plan, shown in zip(plans, evaluated, strict=True)
        if budget - 1 <= sum(plan.kinds) <= budget
        and not any(pair == (CONDITIONAL, CONDITIONAL) for pair in itertools.pairwise(shown))
    ]
    least = min(cost(gram, plan) for plan in allowed)
    found = Scheduler(gram, apart).plan(budget)
    assert found in allowed
    assert cost(gram, found) == pytest.approx(least, rel=1e-4)


def test_a_jump_within_the_span_costs_nothing() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 20))
    latent, output, other = rows[0], rows[1], rows[2]
    everything = np.stack([latent, latent + 2 * output, latent + 2 * output + other, output, other])
    gram = Gram(everything @ everything.T, 2, 1)
    within = jump_residuals(gram, [(gram.output(0, 0),)], np.array([0]), np.array([[1, 2]]))
    assert within[0, 0] < 1e-4 * gram.matrix[1, 1]
    assert within[0, 1] > 0.1


def test_even_placement_spaces_evenly() -> None:
    assert even_placement(10, 5).kinds == (2, 0) * 5
    assert even_placement(10, 4).strip() == "█·█··█·█··"
    with pytest.raises(ValueError, match="expected 1 to 10"):
        even_placement(10, 11)


def test_weights_that_all_images_share_are_found() -> None:
    torch.manual_seed(0)
    features, true = torch.randn(4, 6, 50), torch.tensor([0.5, -0.2, 0.1, 0.0])
    residual = torch.einsum("k,kbe->be", true, features)
    weights, shrinkage = NormalEquations.of(features, residual).solve(difference_basis([3]))
    assert torch.allclose(weights.float(), true, atol=1e-3)
    assert shrinkage == pytest.approx(1, abs=1e-3)


def test_images_that_contradict_each_other_leave_the_plain_forecast() -> None:
    features = torch.ones(2, 2, 4)
    features[1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    residual = torch.stack([torch.ones(4), -torch.ones(4)])
    weights, shrinkage = NormalEquations.of(features, residual).solve(difference_basis([1]))
    assert shrinkage == 0 and not weights.any()


def test_equations_of_images_in_turn_are_those_of_one_batch() -> None:
    torch.manual_seed(1)
    features, residual = torch.randn(3, 4, 20), torch.randn(4, 20)
    whole = NormalEquations.of(features, residual)
    parts = [NormalEquations.of(features[:, part], residual[part]) for part in (slice(0, 2), slice(2, 4))]
    joined = parts[1].join(parts[0])
    assert joined.images == 4
    assert torch.equal(joined.inner, whole.inner) and torch.equal(joined.target, whole.target)


def test_a_speedup_counts_the_correction_of_every_step() -> None:
    """Ten steps of 9 + 1 seconds uncached; cached 10 × (1 + ½) + 9 × (2 + .6 of one)."""
    plan = Plan((FULL, SKIP, CONDITIONAL, SKIP, FULL, *(SKIP,) * 5))
    timing = {"denoiser": 9.0, "outside": 1.0, "correction": 0.5, "half_share": 0.6}
    assert speedup_of(plan, timing) == pytest.approx(100 / (15 + 9 * 2.6))
    del timing["correction"]  # a file of an earlier version
    assert speedup_of(plan, timing) == pytest.approx(100 / (10 + 9 * 2.6))
