"""FastCache: its χ² test, its thresholds and its linear maps by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import with_sections
from scipy.stats import chi2
from toys import (
    ALL_FAMILIES,
    ALWAYS,
    ScriptedTransformer,
    Toy,
    attached,
    counted,
    growing_values,
    scripted_engine,
)

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import dit as dit_adapter
from xfuser.model_executor.cache.calibration.store import Calibration
from xfuser.model_executor.cache.policies.fast import FastPolicy, FastState
from xfuser.model_executor.cache.steps import Call

STEPS = 5
LONG = 12
# Below some of the changes that each toy shows in LONG steps, with α = 0, which leaves the decision to the threshold.
SOME: dict[str, dict[str, Any]] = {
    "dit": {"rel_l1_thresh": 0.1, "significance": 0},
    "flux": {"rel_l1_thresh": 0.048, "significance": 0},
    "pixart": {"rel_l1_thresh": 0.05, "significance": 0},
    "sd3": {"rel_l1_thresh": 0.045, "significance": 0},
}
QUANTILE = 18.307038 / 10  # of χ² with 10 degrees of freedom at 95%, divided by them, as printed in tables
MEDIAN = 9.341818 / 10
ELEMENTS = 10.0


def policy_of(calibration: Calibration | None = None, blocks: int = 1, **settings: Any) -> FastPolicy:
    settings = {"rel_l1_thresh": 10.0} | settings
    return FastPolicy(CacheConfig(use_cache="Fast", **settings), dit_adapter.SPEC, blocks, calibration)


def call_at(step: int, num_steps: int | None = None) -> Call:
    return Call(step, ("0",), False, num_steps)


def judged(policy: FastPolicy, state: FastState, step: int, square: float, num_steps: int | None = None) -> float:
    """What the policy proposes for a block whose input's squared relative change was this."""
    return policy.propose_block(state, 0, [square * 100, 100.0, ELEMENTS], call_at(step, num_steps))


def warmed(policy: FastPolicy, *squares: float) -> FastState:
    state = policy.new_state()
    for step, square in enumerate(squares, start=2):
        judged(policy, state, step, square)
    return state


# -- never ---------------------------------------------------------------------------------------------------------


NEVER: dict[str, dict[str, Any]] = {
    "alone": {},
    "no token stands still": {"motion_threshold": 0, "sync": "layer"},
    "any significance": {"significance": 0, "adaptive_threshold": True, "motion_threshold": 0.0},
    "matched budget": {"enable_adacorrection": True},
    "no tolerance": {"enable_adacorrection": True, "motion_threshold": 0.3, "adacorr_tolerance": 0},
}


@pytest.mark.parametrize("settings", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_threshold_of_0_changes_no_bit(toy: Toy, settings: dict[str, Any]) -> None:
    expected = toy.plain_images(STEPS, batch=2)
    level = "transformer" if settings == {} else "pipeline"
    with attached(toy.pipeline, level, "Fast", rel_l1_thresh=0, **settings) as engine:
        images = toy.images(STEPS, batch=2)
        summary = engine.summary()
    assert np.array_equal(images, expected)
    assert (summary["hit_rate"], summary["flops_saved"]) == (0, 0)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_higher_one_does_change_them(toy: Toy) -> None:
    """Else the test above would hold for blocks that contribute nothing."""
    expected = toy.plain_images(LONG)
    with counted(toy) as counts, attached(toy.pipeline, "pipeline", "Fast", **SOME[toy.family]) as engine:
        images = toy.images(LONG)
        summary = engine.summary()
    assert 0.2 < summary["hit_rate"] < 0.75
    assert summary["hit_rate"] == pytest.approx(1 - sum(counts) / (LONG * len(counts)))
    assert 1e-5 < np.abs(images - expected).mean() < 0.1
    (plan,) = summary["plan"].values()
    assert all(all(row) for row in plan[:3])


# -- the test ------------------------------------------------------------------------------------------------------


def test_a_change_within_the_noise_is_skipped() -> None:
    """Warm-up changes of 0.01 and 0.02: noise 0.015, and the limit 0.015 · 1.8307 = 0.027461."""
    policy = policy_of()
    state = policy.new_state()
    assert judged(policy, state, 2, 0.01) == 1
    assert judged(policy, state, 3, 0.02) == 0
    assert judged(policy, state, 4, 0.0274) == 0
    assert judged(policy, state, 5, 0.0275) == 1
    # Later changes are judged by the warm-up's noise, not by their own.
    assert judged(policy, state, 6, 0.0274) == 0
    assert judged(policy, state, 7, 0.0) == 0


@pytest.mark.parametrize(("significance", "quantile"), [(0.05, QUANTILE), (0.5, MEDIAN)])
def test_the_limit_is_the_quantile(significance: float, quantile: float) -> None:
    """A larger α tolerates less."""
    policy = policy_of(significance=significance)
    state = warmed(policy, 0.02, 0.02)
    assert judged(policy, state, 4, 0.02 * quantile * 0.999) == 0
    assert judged(policy, state, 5, 0.02 * quantile * 1.001) == 1


@pytest.mark.parametrize(("significance", "skips"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_limits_of_alpha(significance: float, skips: float) -> None:
    policy = policy_of(significance=significance)
    assert judged(policy, warmed(policy, 0.02, 0.02), 4, 0.02) == skips


def test_the_quantile_of_many_elements_is_about_1() -> None:
    """Which is why the published test, without a noise variance, passes everything."""
    policy = policy_of()
    elements = 256 * 1152
    limit = 0.01 * chi2.ppf(0.95, elements) / elements
    assert limit == pytest.approx(0.01 * 1.0043, abs=1e-6)
    state = policy.new_state()
    for step, (square, proposal) in enumerate(((0.01, 1), (0.01, 0), (limit * 0.9999, 0), (limit * 1.0001, 1)), 2):
        assert policy.propose_block(state, 0, [square * 7, 7.0, float(elements)], call_at(step)) == proposal


def test_the_noise_of_a_calibration_replaces_the_warm_up() -> None:
    nothing = torch.zeros(3, 1, 1, dtype=torch.float64)
    calibration = with_sections(nothing, (0.001,))
    policy = policy_of(calibration)
    state = warmed(policy, 0.02, 0.02)
    assert judged(policy, state, 4, 0.001 * QUANTILE * 0.999) == 0
    assert judged(policy, state, 5, 0.001 * QUANTILE * 1.001) == 1


def test_rel_l1_thresh_bounds_the_change_as_well() -> None:
    policy = policy_of(rel_l1_thresh=0.15)
    state = warmed(policy, 0.02, 0.02)
    assert judged(policy, state, 4, 0.1499**2) == 0
    assert judged(policy, state, 5, 0.1501**2) == 1


def test_the_first_three_steps_are_evaluated() -> None:
    policy = policy_of(rel_l1_thresh=ALWAYS)
    state = policy.new_state()
    assert [judged(policy, state, step, 0.0) for step in (1, 2, 3)] == [1, 1, 0]


def test_a_block_that_was_never_seen_twice_is_evaluated() -> None:
    policy = policy_of(rel_l1_thresh=ALWAYS)
    assert policy.propose_block(policy.new_state(), 0, [0.0, 0.0, 0.0], call_at(5)) == 1


@pytest.mark.parametrize("sums", [[math.nan, 100.0], [100.0, math.nan], [math.inf, 100.0], [1.0, math.inf]])
def test_sums_that_are_not_finite_evaluate(sums: list[float]) -> None:
    """Whatever was small before: nothing is known of what is there now."""
    policy = policy_of(rel_l1_thresh=ALWAYS)
    state = warmed(policy, 0.02, 0.02, 0.01)
    assert policy.propose_block(state, 0, [*sums, ELEMENTS], call_at(5)) == 1
    assert judged(policy, state, 6, 0.01) == 0


def test_a_block_that_was_not_seen_is_judged_as_before() -> None:
    """Sums of zero say that the block's input went by unseen (AdaCorrection took a whole stack at once)."""
    policy = policy_of()
    state = warmed(policy, 0.02, 0.02)
    square = 0.02 * QUANTILE * 1.2
    assert judged(policy, state, 4, square) == 1
    assert policy.propose_block(state, 0, [0.0, 0.0, 0.0], call_at(5)) == 1


def test_the_adaptive_threshold() -> None:
    """β₀ + β₁·var + β₂·t + β₃·t² = 0.01 + 0.5·0.0025 - 0.002·0.4 + 0.00005·0.16 = 0.010458 at step 4 of 10.

    The variance is that of δ = 0.1 and 0.2 and of the one that is judged, so the limit is solved for.
    """
    policy = policy_of(adaptive_threshold=True)

    def limit(delta: float, time: float) -> float:
        mean = (0.1 + 0.2 + delta) / 3
        variance = ((0.1 - mean) ** 2 + (0.2 - mean) ** 2 + (delta - mean) ** 2) / 3
        return 0.01 + 0.5 * variance - 0.002 * time + 5e-5 * time**2

    assert limit(0.15, 0.0) == pytest.approx(0.01 + 0.5 * 0.005 / 3)
    for num_steps, time in ((10, 0.4), (None, 0.0)):
        # Where the limit crosses the change itself: bisection.
        low, high = 0.0, 0.1
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if middle < limit(middle, time) else (low, middle)
        for factor, proposal in ((0.999, 0), (1.001, 1)):
            state = warmed(policy, 0.01, 0.04)
            assert judged(policy, state, 4, (low * factor) ** 2, num_steps) == proposal


def test_the_adaptive_threshold_never_raises_the_other() -> None:
    policy = policy_of(adaptive_threshold=True, rel_l1_thresh=0.001)
    assert judged(policy, warmed(policy, 0.01, 0.04), 4, 0.002**2, 10) == 1


def test_a_change_over_several_steps_counts_by_the_step() -> None:
    """δ of 0.3 over 3 steps is 0.1 a step: δ² = 0.01."""
    policy = policy_of()
    state = policy.new_state()
    inputs = torch.full((1, 5, 2), 2.0)
    policy.observe(state, 0, inputs, 0)
    assert state.layer(0).sums is None
    policy.observe(state, 0, inputs * 1.1, 1)
    assert state.layer(0).sums.tolist() == pytest.approx([0.4, 40.0, 10.0], rel=1e-5)
    policy.observe(state, 0, inputs * 1.1 * 1.3, 4)
    told = policy.measure(state, torch.nn.Identity(), {}, (inputs,), None).tolist()
    assert told == pytest.approx([0.01 * 48.4, 48.4, 10.0], rel=1e-5)
    policy.propose_blocks(state, told, call_at(5))
    assert state.layer(0).changes == pytest.approx([0.01], rel=1e-5)
    # Told once: the next step without an observation has nothing to tell.
    assert policy.measure(state, torch.nn.Identity(), {}, (inputs,), None).tolist() == [0.0, 0.0, 0.0]


def test_inputs_of_another_shape_are_not_compared() -> None:
    policy = policy_of()
    state = policy.new_state()
    policy.observe(state, 0, torch.ones(1, 5, 2), 0)
    policy.observe(state, 0, torch.ones(2, 5, 2), 1)
    assert state.layer(0).sums is None


# -- which step's sums ---------------------------------------------------------------------------------------------

FACTORS = [1.1, 1.1, 1.1, 1.5, 1.1, 1.1, 1.1]


@pytest.mark.parametrize(("sync", "jump_is_seen_at"), [("layer", 4), ("step", 5)])
def test_the_jump_is_seen_at_once_or_a_step_later(sync: str, jump_is_seen_at: int) -> None:
    """Changes of 0.1, and one of 0.5 from step 3 to step 4. 32 elements: the noise's quantile is 1.44."""
    transformer = ScriptedTransformer(lambda step: 0.0, lambda step: 0.0)
    engine = scripted_engine(transformer, use_cache="Fast", rel_l1_thresh=ALWAYS, sync=sync)
    transformer.run(growing_values(FACTORS))
    summary = engine.summary()
    engine.remove()
    evaluated = [step for step, row in enumerate(summary["plan"]["0"]) if any(row)]
    assert all(row[0] == row[1] for row in summary["plan"]["0"])
    assert evaluated == [0, 1, 2, jump_is_seen_at]
    assert [block.calls for block in transformer.blocks] == [4, 4]


@pytest.mark.parametrize("sync", ["layer", "step"])
def test_what_was_proposed_is_what_was_done(sync: str) -> None:
    """Alone, Fast's proposals are obeyed. The jump comes at the last step, which only ``layer`` can see."""
    transformer = ScriptedTransformer(lambda step: 0.0, lambda step: 0.0)
    engine = scripted_engine(transformer, use_cache="Fast", rel_l1_thresh=ALWAYS, sync=sync)
    transformer.run(growing_values([*[1.1] * 6, 1.5]))
    summary = engine.summary()
    engine.remove()
    assert summary["proposed_share"] == pytest.approx(1 - summary["hit_rate"])


@pytest.mark.parametrize("sync", ["layer", "step"])
def test_blocks_are_judged_apart(sync: str) -> None:
    """The first block adds a jump at step 4, which the second one's input shows."""
    transformer = ScriptedTransformer(lambda step: 4.0 * (step >= 4), lambda step: 0.0)
    engine = scripted_engine(transformer, use_cache="Fast", rel_l1_thresh=0.105, sync=sync, approximation="residual")
    # At step 4 the input's own change makes both blocks run; afterwards the second one's input has jumped.
    transformer.run(growing_values([1.1, 1.1, 1.1, 1.11, 1.1, 1.1, 1.1]))
    plan = engine.summary()["plan"]["0"]
    engine.remove()
    first, second = ([step for step, row in enumerate(plan) if row[block]] for block in (0, 1))
    assert first == [0, 1, 2, 4 if sync == "layer" else 5]
    # By the step: block 0 runs at 5 and its jump reaches block 1 there, whose change is told at 6.
    assert second == ([0, 1, 2, 4] if sync == "layer" else [0, 1, 2, 5, 6])


def test_layers_decide_by_layers_in_the_first_step_that_may_skip() -> None:
    """Steps 1 and 2 are the noise; the change that is judged at step 3 is not part of it."""
    transformer = ScriptedTransformer(lambda step: 0.0)
    engine = scripted_engine(transformer, use_cache="Fast", rel_l1_thresh=ALWAYS, sync="layer")
    # 32 elements, quantile 1.4436: limit 0.1 · 1.2015 = 0.12015. With the judged one in the mean it would be 0.1246.
    assert chi2.ppf(0.95, 32) / 32 == pytest.approx(1.4436, abs=1e-4)
    transformer.run(growing_values([1.1, 1.1, 1.122]))
    plan = engine.summary()["plan"]["0"]
    engine.remove()
    assert plan == [[1], [1], [1], [1]]
