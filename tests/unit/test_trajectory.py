"""Learned correction of the latent, through the seams that a user has: what a generation does under a plan."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from trajectories import STEPS, Calls, draw, psnr

from xfuser import apply_cache_on_pipeline
from xfuser.model_executor.adapters.dit import build_small as build_toy_dit

pytestmark = pytest.mark.usefixtures("own_store")


def test_the_first_image_is_exact_and_the_next_are_learned(tiny: Any, attached: Any) -> None:
    attached.remove()
    uncached, other = draw(tiny), draw(tiny, seed=50)
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
    try:
        assert np.array_equal(draw(tiny), uncached)
        with Calls(tiny) as calls:
            cached = draw(tiny, seed=50)
        summary = engine.summary()
        assert not np.array_equal(cached, other)
        assert psnr(cached, other) > 35
        assert sum(calls.rows) == summary["evaluated_share"] * STEPS * 4
        assert summary["evaluated_share"] <= 0.5
        assert summary["learned_generations"] == 1
        assert np.array_equal(draw(tiny, seed=50), cached), "a second generation differs"
    finally:
        engine.remove()
    assert np.array_equal(draw(tiny), uncached)


def test_a_skipped_step_calls_nothing_and_half_a_step_evaluates_half(tiny: Any, attached: Any) -> None:
    draw(tiny)
    with Calls(tiny) as calls:
        draw(tiny, seed=9)
    kinds = [kind for kind in attached.summary()["plan"] if kind]
    assert calls.rows == [2 * kind for kind in kinds]


def test_remove_leaves_no_trace(tiny: Any) -> None:
    transformer, scheduler = tiny.transformer, tiny.scheduler
    before = type(tiny), type(transformer), dict(vars(scheduler)), set(vars(transformer))
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
    draw(tiny)
    draw(tiny)
    engine.remove()
    assert (type(tiny), type(transformer)) == before[:2]
    assert set(vars(transformer)) == before[3]
    assert not {"step", "set_timesteps"} & set(vars(scheduler))


def test_all_evaluated_is_bit_identical(tiny: Any) -> None:
    expected = draw(tiny)
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=1.0)
    try:
        for _ in range(2):
            assert np.array_equal(draw(tiny), expected)
        assert engine.summary()["evaluated_share"] == 1
    finally:
        engine.remove()


def test_an_exception_in_the_middle_leaves_nothing_behind(tiny: Any, attached: Any) -> None:
    draw(tiny)
    expected = draw(tiny, seed=4)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = tiny.transformer.register_forward_pre_hook(lambda *_: fail() if len(seen) == 3 else seen.append(1))
    seen: list[int] = []
    with pytest.raises(RuntimeError, match="in the middle"):
        draw(tiny, seed=5)
    hook.remove()
    assert np.array_equal(draw(tiny, seed=4), expected)


@pytest.mark.parametrize(
    ("scheduler", "least"),
    [
        (DDIMScheduler, 40),
        (EulerDiscreteScheduler, 30),
        (DPMSolverMultistepScheduler, 30),
        (UniPCMultistepScheduler, 30),
        (LMSDiscreteScheduler, 30),
        (DDPMScheduler, 20),
        (EulerAncestralDiscreteScheduler, 20),
        (HeunDiscreteScheduler, 25),
    ],
)
def test_schedulers(tiny: Any, scheduler: Any, least: float) -> None:
    kept = tiny.scheduler
    tiny.scheduler = scheduler.from_config(kept.config)
    try:
        expected, other = draw(tiny), draw(tiny, seed=60)
        engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
        try:
            assert np.array_equal(draw(tiny), expected)
            learned = draw(tiny, seed=60)
            assert engine.summary()["evaluated_share"] <= 0.5
            assert psnr(learned, other) > least
        finally:
            engine.remove()
    finally:
        tiny.scheduler = kept


def test_memory_between_steps_is_a_few_latents(tiny: Any, attached: Any) -> None:
    draw(tiny)
    draw(tiny)
    latent = 4 * tiny.transformer.config.in_channels * tiny.transformer.config.sample_size**2 * 4
    assert attached.summary()["memory_bytes"] <= 8 * latent
    draw(tiny, guidance=1.0)
    draw(tiny, guidance=1.0)
    assert attached.summary()["memory_bytes"] <= 8 * latent / 2


def test_two_pipelines_in_two_threads(tiny: Any) -> None:
    pipelines = [build_toy_dit(seed) for seed in (0, 1)]
    engines = [apply_cache_on_pipeline(each, adacorr_budget=0.5) for each in pipelines]
    for each in pipelines:
        draw(each)
    expected = [draw(each, seed=5) for each in pipelines]
    got: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda index=index: got.__setitem__(index, draw(pipelines[index], seed=5)))
        for index in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(got[index], expected[index]) for index in range(2))
    for engine in engines:
        engine.remove()


def test_compiled_with_full_graph(tiny: Any) -> None:
    expected, other = draw(tiny), draw(tiny, seed=8)
    kept = tiny.transformer
    tiny.transformer = torch.compile(kept, fullgraph=True, backend="eager")
    try:
        engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
        assert np.allclose(draw(tiny), expected, atol=1e-5)
        assert psnr(draw(tiny, seed=8), other) > 35
        assert engine.summary()["evaluated_share"] <= 0.5
        engine.remove()
    finally:
        tiny.transformer = kept


REFUSED = [
    ({}, "exactly one"),
    ({"target_speedup": 2, "min_psnr": 40}, "exactly one"),
    ({"target_speedup": 0.5}, "target_speedup"),
    ({"target_speedup": "2"}, "target_speedup"),
    ({"min_psnr": float("nan")}, "min_psnr"),
    ({"adacorr_budget": 1.5}, "adacorr_budget"),
    ({"target_speedup": 2, "calibration_images": 0}, "calibration_images"),
    ({"target_speedup": 2, "calibration_reference": "fine"}, "calibration_reference"),
    ({"target_speedup": 2, "use_cache": "Tea"}, "use_cache"),
    ({"target_speedup": 2, "calibration": "nowhere.safetensors"}, "cannot be read"),
]


@pytest.mark.parametrize(("settings", "named"), REFUSED)
def test_refused_before_anything_is_changed(settings: dict[str, Any], named: str) -> None:
    pipeline = build_toy_dit()
    before = type(pipeline), type(pipeline.transformer)
    settings = settings or {"replay": True}
    with pytest.raises(ValueError, match=named):
        apply_cache_on_pipeline(pipeline, **settings)
    assert (type(pipeline), type(pipeline.transformer)) == before


def test_a_second_application_is_refused(tiny: Any, attached: Any) -> None:
    with pytest.raises(ValueError, match="attached already"):
        apply_cache_on_pipeline(tiny, target_speedup=2)


def test_pipelines_that_cannot_be_followed_are_refused() -> None:
    pipeline = build_toy_dit()

    class ByHand(type(pipeline)):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            return args

    class Calling(type(pipeline)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    calling = Calling(pipeline.transformer, pipeline.vae, pipeline.scheduler)
    apply_cache_on_pipeline(calling, target_speedup=2).remove()
    by_hand = ByHand(pipeline.transformer, pipeline.vae, pipeline.scheduler)
    with pytest.raises(TypeError, match="does not step its scheduler"):
        apply_cache_on_pipeline(by_hand, target_speedup=2)
