"""A scheduler or a transformer assigned to a pipeline after a cache was attached: the cache goes with it, or says why
not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from peft import LoraConfig, inject_adapter_in_model
from toys import Toy, attached

from xfuser import apply_cache_on_pipeline
from xfuser.model_executor.adapters.dit import build_small as build_toy_dit

STEPS = 6
TEA: dict[str, Any] = {"use_cache": "Tea", "rel_l1_thresh": 0.3}


@pytest.fixture
def own() -> Toy:
    return Toy("dit", build_toy_dit())


def other_scheduler(pipeline: Any) -> None:
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)


def deeper_transformer(pipeline: Any) -> None:
    pipeline.transformer = build_toy_dit(seed=5, layers=6).transformer


@pytest.mark.parametrize("change", [other_scheduler, deeper_transformer])
def test_the_next_image_is_a_fresh_pipelines(own: Toy, change: Callable[[Any], None]) -> None:
    fresh = Toy("dit", build_toy_dit())
    change(fresh.pipeline)
    with attached(fresh.pipeline, "pipeline", **TEA) as engine:
        expected, reference = fresh.images(STEPS), engine.summary()
    kept, scheduler = own.transformer, own.scheduler
    with attached(own.pipeline, "pipeline", **TEA) as engine:
        own.images(STEPS)
        change(own.pipeline)
        assert np.array_equal(own.images(STEPS), expected)
        summary = engine.summary()
        assert summary["plan"] == reference["plan"] and summary["hit_rate"] > 0
        for _ in range(3):
            own.images(STEPS)
        assert engine.summary()["memory_bytes"] == reference["memory_bytes"]
    for each in (kept, own.transformer):
        assert not any("forward" in vars(module) or "compile" in vars(module) for module in each.modules())
    assert not {"step", "set_timesteps"} & (set(vars(scheduler)) | set(vars(own.scheduler)))
    assert type(own.pipeline) is DiTPipeline


@torch.no_grad()
def test_a_loop_of_its_own_is_followed_to_another_scheduler(own: Toy) -> None:
    def loop(pipeline: Any) -> torch.Tensor:
        latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        pipeline.scheduler.set_timesteps(STEPS)
        for timestep in pipeline.scheduler.timesteps:
            noise = pipeline.transformer(latents, timestep=timestep[None], class_labels=torch.tensor([3])).sample
            latents = pipeline.scheduler.step(noise, timestep, latents).prev_sample
        return latents

    fresh = build_toy_dit()
    other_scheduler(fresh)
    with attached(fresh, "pipeline", **TEA):
        expected = loop(fresh)
    with attached(own.pipeline, "pipeline", **TEA) as engine:
        loop(own.pipeline)
        other_scheduler(own.pipeline)
        assert torch.equal(loop(own.pipeline), expected)
        assert engine.summary()["generations"] == 2


def test_a_second_pipeline_with_a_scheduler_of_its_own(own: Toy, caplog: pytest.LogCaptureFixture) -> None:
    """Diffusers' ``from_pipe`` shares the transformer; the cache tells steps by timesteps there, and says so."""
    second = DiTPipeline(own.transformer, own.pipeline.vae, DDIMScheduler.from_config(own.scheduler.config))
    second.set_progress_bar_config(disable=True)
    toy = Toy("dit", second)
    with attached(second, "transformer", **TEA):
        expected = toy.images(STEPS)
    with attached(own.pipeline, "pipeline", **TEA) as engine:
        first = own.images(STEPS)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert np.array_equal(toy.images(STEPS), expected)
        assert "without the scheduler" in caplog.text
        assert np.array_equal(own.images(STEPS), first)
        assert engine.summary()["generations"] == 4


def test_what_cannot_be_followed_is_said_at_the_next_call(own: Toy) -> None:
    other = Toy("dit", build_toy_dit(seed=1))
    kept, scheduler = own.transformer, own.scheduler
    with attached(own.pipeline, "pipeline", **TEA), attached(other.pipeline, "pipeline", **TEA):
        expected = own.images(STEPS)
        for name, value, error, said in (
            ("scheduler", other.scheduler, ValueError, "belongs to a pipeline with a cache"),
            ("transformer", other.transformer, ValueError, "attached already"),
            ("transformer", torch.compile(kept, backend="eager"), ValueError, "compile the blocks instead"),
            ("transformer", torch.nn.Linear(2, 2), TypeError, "cannot cache a Linear"),
        ):
            setattr(own.pipeline, name, value)
            with pytest.raises(error, match=said):
                own.images(STEPS)
            own.pipeline.transformer, own.pipeline.scheduler = kept, scheduler
            assert np.array_equal(own.images(STEPS), expected)


def test_a_calibration_file_is_checked_against_the_new_scheduler(own: Toy, tmp_path: Path) -> None:
    settings = TEA | {"enable_adacorrection": True}
    with attached(own.pipeline, "pipeline", **settings) as engine:
        engine.record()
        own.images(STEPS)
        engine.recorded().save(tmp_path / "made.safetensors")
    with attached(own.pipeline, "pipeline", calibration=str(tmp_path / "made.safetensors"), **settings):
        own.images(STEPS)
        other_scheduler(own.pipeline)
        for _ in range(2):
            with pytest.raises(ValueError, match="made with scheduler 'DDIMScheduler'"):
                own.images(STEPS)


def with_lora(pipeline: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        inject_adapter_in_model(config, pipeline.transformer)


def in_half_precision(pipeline: Any) -> None:
    pipeline.to(torch.bfloat16)


@pytest.mark.parametrize("change", [other_scheduler, deeper_transformer, with_lora, in_half_precision])
def test_what_was_learned_first_is_learned_anew(own: Toy, change: Callable[[Any], None]) -> None:
    """A calibration of the job's first generation belongs to its model and scheduler."""
    settings = TEA | {"enable_adacorrection": True, "calibration": "first"}
    fresh = Toy("dit", build_toy_dit())
    change(fresh.pipeline)
    with attached(fresh.pipeline, "pipeline", **settings) as engine:
        expected = [fresh.images(STEPS, seed=seed) for seed in (1, 2)]
    with attached(own.pipeline, "pipeline", **settings) as engine:
        own.images(STEPS)
        own.images(STEPS)
        assert engine.summary()["hit_rate"] > 0
        change(own.pipeline)
        for seed, image in zip((1, 2), expected, strict=True):
            assert np.array_equal(own.images(STEPS, seed=seed), image)


# -- the trajectory ---------------------------------------------------------------------------------------------------


def test_the_trajectory_does_not_take_another_pipelines_scheduler(own: Toy, tmp_path: Path) -> None:
    other = build_toy_dit(seed=1)
    engines = [apply_cache_on_pipeline(each, adacorr_budget=0.5, store=tmp_path) for each in (own.pipeline, other)]
    kept = own.scheduler
    try:
        own.images(STEPS)
        for name, said in (("scheduler", "belongs to a pipeline"), ("transformer", "attached already")):
            before = getattr(own.pipeline, name)
            setattr(own.pipeline, name, getattr(other, name))
            with pytest.raises(ValueError, match=said):
                own.images(STEPS)
            setattr(own.pipeline, name, before)
        own.images(STEPS)
    finally:
        for engine in engines:
            engine.remove()
    assert not {"step", "set_timesteps"} & (set(vars(kept)) | set(vars(other.scheduler)))
    assert type(own.transformer) is type(Toy("dit", build_toy_dit()).transformer)


def test_a_goal_beyond_reach_is_refused_for_its_own_kind_of_call(own: Toy, tmp_path: Path) -> None:
    """With other steps, another scheduler or other weights it may well be reached."""
    expected = own.images(12)
    engine = apply_cache_on_pipeline(own.pipeline, target_speedup=500, store=tmp_path)
    try:
        own.images(STEPS)
        with pytest.raises(ValueError, match="the largest is"):
            own.images(STEPS)
        assert np.array_equal(own.images(12), expected)
        with pytest.raises(ValueError, match="the largest is"):
            own.images(12)
    finally:
        engine.remove()
