"""What the trajectory learns, when it learns anew, and how a goal becomes a plan."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    UniPCMultistepScheduler,
)
from trajectories import STEPS, Calls, draw, psnr

from xfuser import apply_cache_on_pipeline
from xfuser.model_executor.cache.adacorrection.trajectory.weights import NormalEquations

pytestmark = pytest.mark.usefixtures("own_store")


def test_a_second_process_finds_what_was_learned(tiny: Any) -> None:
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
    draw(tiny)
    cached = draw(tiny, seed=7)
    engine.remove()
    again = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
    try:
        assert np.array_equal(draw(tiny, seed=7), cached)
        assert again.summary()["learned_generations"] == 0
    finally:
        again.remove()


@pytest.mark.parametrize("change", ["steps", "scheduler", "weights", "guidance off"])
def test_what_does_not_fit_is_learned_anew(tiny: Any, attached: Any, change: str) -> None:
    draw(tiny)
    scheduler = tiny.scheduler
    parameter = next(tiny.transformer.parameters())
    kept = parameter.detach().clone()
    more: dict[str, Any] = {}
    try:
        if change == "steps":
            more = {"steps": STEPS + 2}
        elif change == "guidance off":
            more = {"guidance": 1.0}
        elif change == "scheduler":
            tiny.scheduler = UniPCMultistepScheduler.from_config(scheduler.config)
        else:
            parameter.data.add_(0.05)
        draw(tiny, **more)
        assert attached.summary()["learned_generations"] == 2
        draw(tiny, **more)
        assert attached.summary()["evaluated_share"] < 1
    finally:
        tiny.scheduler = scheduler
        parameter.data.copy_(kept)


def test_what_may_differ_is_used(tiny: Any, attached: Any) -> None:
    draw(tiny)
    draw(tiny, seed=3, images=3, guidance=2.5)
    assert attached.summary()["learned_generations"] == 1
    assert attached.summary()["evaluated_share"] <= 0.5
    assert attached.summary()["differs"] == ["batch 3, learned with 2"]


def test_learned_weights_beat_the_plain_forecast(tiny: Any, tmp_path: Path) -> None:
    reference = draw(tiny, seed=70, images=4)
    quality = {}
    for name in ("learned", "forecast"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "forecast":
                nothing = lambda self, basis: (torch.zeros(len(basis), dtype=torch.float64), 0.0)  # noqa: E731
                patch.setattr(NormalEquations, "solve", nothing)
            engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5, store=tmp_path / name)
            draw(tiny, images=4)
            quality[name] = psnr(draw(tiny, seed=70, images=4), reference)
            engine.remove()
    assert quality["learned"] > quality["forecast"] + 3


def test_min_psnr_takes_the_fewest_evaluations_that_are_predicted_to_reach_it(tiny: Any) -> None:
    engine = apply_cache_on_pipeline(tiny, min_psnr=36)
    try:
        draw(tiny, images=4)
        draw(tiny, seed=30, images=4)
        summary = engine.summary()
        assert summary["predicted"]["psnr"] >= 36
        spent = sum(summary["plan"])
        fewer = [each for each in engine.calibration.learned.values() if sum(each.plan.kinds) < spent]
        assert fewer and all(each.predicted_psnr < 36 for each in fewer)
    finally:
        engine.remove()


def test_target_speedup_counts_what_is_outside_the_denoiser(tiny: Any) -> None:
    engine = apply_cache_on_pipeline(tiny, target_speedup=2)
    try:
        draw(tiny)
        draw(tiny)
        summary = engine.summary()
        assert summary["asked"] == {"target_speedup": 2}
        # Of 12 steps, each half evaluation is 8% of the time, and the time that is measured varies.
        assert summary["predicted"]["speedup"] == pytest.approx(2, rel=0.2)
        assert summary["evaluated_share"] < 0.6
        assert summary["learned_generations"] == 1
        timing = engine.calibration.timing
        assert 0 < timing["correction"] < timing["denoiser"]
    finally:
        engine.remove()


def test_a_speedup_beyond_reach_gives_the_image_and_then_refuses(tiny: Any, caplog: Any) -> None:
    expected = draw(tiny)
    engine = apply_cache_on_pipeline(tiny, target_speedup=500)
    try:
        with caplog.at_level(logging.WARNING):
            assert np.array_equal(draw(tiny), expected)
        assert "the largest is" in caplog.text
        with pytest.raises(ValueError, match="the largest is"):
            draw(tiny)
    finally:
        engine.remove()


def test_without_a_replay_the_denoiser_is_not_called_again(tiny: Any) -> None:
    reference = draw(tiny, seed=70)
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5, replay=False)
    try:
        with Calls(tiny) as calls:
            draw(tiny)
        assert len(calls.rows) == STEPS + 2  # the check of the half batch, and the replay's first step
        assert psnr(draw(tiny, seed=70), reference) > 32
    finally:
        engine.remove()


def test_a_finer_reference_is_nearer_to_the_fine_solution(tiny: Any) -> None:
    fine = draw(tiny, seed=70, images=4, steps=4 * STEPS)
    quality = {}
    for reference in (None, "4x"):
        engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5, calibration_reference=reference)
        draw(tiny, images=4)
        quality[reference] = psnr(draw(tiny, seed=70, images=4), fine)
        assert engine.summary()["reference"] == reference
        engine.remove()
    assert quality["4x"] > quality[None] + 1
    assert quality["4x"] > psnr(draw(tiny, seed=70, images=4), fine)


def test_a_finer_grid_is_refused_where_noise_is_added_and_the_image_is_not_lost(tiny: Any, caplog: Any) -> None:
    kept = tiny.scheduler
    tiny.scheduler = DDPMScheduler.from_config(kept.config)
    try:
        expected = draw(tiny)
        engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5, calibration_reference="4x")
        assert np.array_equal(draw(tiny), expected)
        assert "adds no noise" in caplog.text
        with pytest.raises(ValueError, match="adds no noise"):
            draw(tiny)
        engine.remove()
    finally:
        tiny.scheduler = kept


def test_branches_stay_together_where_they_must_whoever_learned(tiny: Any) -> None:
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.45)
    draw(tiny)
    draw(tiny)
    assert 1 in engine.summary()["plan"], "nothing was learned of branches apart"
    engine.remove()
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.45, branches_apart=False)
    draw(tiny)
    draw(tiny)
    assert set(engine.summary()["plan"]) == {0, 2}
    engine.remove()


def test_a_damaged_stored_calibration_is_learned_anew(tiny: Any, tmp_path: Path, caplog: Any) -> None:
    for _ in range(2):
        engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
        draw(tiny)
        assert engine.summary()["learned_generations"] == 1
        engine.remove()
        (stored,) = (tmp_path / "xfuser" / "trajectory").glob("*.safetensors")
        stored.write_bytes(b"damaged")
    assert "learned anew" in caplog.text


def test_first_neither_looks_nor_stores(tiny: Any, tmp_path: Path) -> None:
    for _ in range(2):
        engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5, calibration="first")
        draw(tiny)
        assert engine.summary()["learned_generations"] == 1
        draw(tiny)
        assert engine.summary()["evaluated_share"] <= 0.5
        engine.remove()
    assert not (tmp_path / "xfuser").exists()


def test_a_quality_that_only_the_full_run_has_is_learned_once(tiny: Any) -> None:
    expected = draw(tiny)
    engine = apply_cache_on_pipeline(tiny, min_psnr=150)
    for _ in range(2):
        assert np.array_equal(draw(tiny), expected)
    assert engine.summary()["learned_generations"] == 1
    engine.remove()
