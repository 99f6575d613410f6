"""PipeFusion: stages hold their own weights, displaced steps stay close, and a cache decides alike on all stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pool import Job, Outcome, Pool, alone
from test_parity import assert_alike

STEPS = 50
BUDGET = {"enable_adacorrection": True, "adacorr_budget": 0.45}


def job_of(stages: int, cache: dict[str, Any] | None = None, **parallel: Any) -> Job:
    degrees = {"pipefusion_parallel_degree": stages, "num_pipeline_patch": stages, "warmup_steps": 4}
    return Job("tiny-dit", degrees | parallel, cache or {"use_cache": None}, steps=STEPS, images=4, seed=11)


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over the images, in dB, pixels from 0 to 1."""
    square = ((ours.astype(np.float64) - theirs) ** 2).mean(axis=(1, 2, 3))
    return float((-10 * np.log10(np.maximum(square, 1e-12))).mean())


def test_displaced_steps_stay_close(two: Pool, four: Pool) -> None:
    for pool, stages, least in ((two, 2, 58), (four, 4, 54)):
        job = job_of(stages)
        outcomes = pool.run(job)
        assert_alike(outcomes)
        said = outcomes[0].summary["pipefusion"]
        assert (said["synchronous_steps"], said["displaced_steps"]) == (4, STEPS - 4)
        assert said["displaced_steps_by_lag"] == {1: STEPS - 4}
        assert said["ideal_efficiency"] == stages / (2 * stages - 1)
        ours = psnr(outcomes[0].images, alone(job).images)
        assert least <= ours < 100, "displaced steps cannot be exact"


def test_no_warmup_displaces_from_the_second_step_on(two: Pool) -> None:
    """xDiT's own README names ``--warmup_steps 0``; the first step has nothing to read that is older."""
    job = Job("small-dit", {"pipefusion_parallel_degree": 2, "warmup_steps": 0}, {"use_cache": None}, steps=5)
    outcomes = two.run(job)
    assert_alike(outcomes)
    said = outcomes[0].summary["pipefusion"]
    assert (said["synchronous_steps"], said["displaced_steps"]) == (1, 4)


def test_a_stage_holds_its_own_weights(two: Pool) -> None:
    job = job_of(2)
    whole = alone(job).parameter_bytes
    assert all(each.parameter_bytes <= 0.6 * whole for each in two.run(job))
    uneven = two.run(job_of(2, attn_layer_num_for_pp=(2, 10)))
    assert uneven[0].parameter_bytes < 0.3 * whole < uneven[1].parameter_bytes
    assert uneven[0].summary["pipefusion"]["stages"] == [[0, 2], [2, 12]]


@pytest.mark.parametrize("method", ["Fast", "Tea", "Fb"])
def test_a_budget_under_pipefusion(two: Pool, method: str) -> None:
    """Without --pipefusion_max_lag a cache's evaluations are synchronous, so nothing is lost to old keys and values."""
    uncached = alone(job_of(2)).images
    job = job_of(2, {"use_cache": method, "rel_l1_thresh": 0.1, **BUDGET}, verify_agreement=True)
    outcomes, one = two.run(job), alone(job)
    assert_alike(outcomes)
    assert abs(outcomes[0].summary["hit_rate"] - one.summary["hit_rate"]) <= 0.02
    assert psnr(outcomes[0].images, uncached) >= psnr(one.images, uncached) - 1
    assert outcomes[0].summary["pipefusion"]["displaced_steps"] == 0


def test_old_keys_and_values_are_bounded(two: Pool) -> None:
    cache = {"use_cache": "Tea", "rel_l1_thresh": 0.1, **BUDGET}
    for limit in (1, 2):
        outcomes = two.run(job_of(2, cache, pipefusion_max_lag=limit, verify_agreement=True))
        assert_alike(outcomes)
        said = outcomes[0].summary["pipefusion"]
        assert 0 < said["displaced_steps"] and max(said["displaced_steps_by_lag"]) <= limit
        evaluated = sum(all(step) for step in outcomes[0].summary["plan"]["0"])
        assert said["synchronous_steps"] + said["displaced_steps"] == evaluated


def test_skipped_steps_of_a_whole_run_need_no_pipe(two: Pool) -> None:
    """The last stage alone remembers the run, and what stands in for it is made there."""
    job = job_of(2, {"use_cache": "Tea", "rel_l1_thresh": 0.1})
    first, last = (each.summary for each in two.run(job))
    assert first["memory_bytes"] == 0 < last["memory_bytes"]


def test_pipefusion_with_ulysses(four: Pool) -> None:
    job = job_of(2, ulysses_degree=2)
    outcomes: list[Outcome] = four.run(job)
    assert_alike(outcomes)
    assert psnr(outcomes[0].images, alone(job).images) >= 36


@pytest.mark.parametrize("family", ["flux", "pixart", "sd3"])
def test_patches_of_every_family(two: Pool, family: str) -> None:
    """Text tokens are in patches like image tokens, and three patches do not divide 64."""
    degrees = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 3, "warmup_steps": 2}
    job = Job(family, degrees, {"use_cache": None}, steps=8)
    outcomes = two.run(job)
    assert_alike(outcomes)
    assert outcomes[0].summary["pipefusion"]["displaced_steps"] == 6
    assert psnr(outcomes[0].images, alone(job).images) >= 34
