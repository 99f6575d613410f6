"""Learned correction of the latent, through the seams that a user has: a real pipeline, and a scripted one by hand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
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
from toys import build_toy_dit

from xfuser import apply_cache_on_pipeline, load_pipeline
from xfuser.model_executor.cache.adacorrection.trajectory.weights import NormalEquations

STEPS = 12


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_pipeline("tiny-dit").pipeline


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def draw(pipeline: Any, seed: int = 0, images: int = 2, steps: int = STEPS, guidance: float = 1.5, **more: Any) -> Any:
    torch.manual_seed(seed)  # DiTPipeline gives its generators to the first noise only
    generators = [torch.Generator().manual_seed(seed + index) for index in range(images)]
    labels = [index % 10 for index in range(images)]
    call = {"generator": generators, "num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    return pipeline(labels, **call, **more).images


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    errors = np.square(images - reference).reshape(len(images), -1).mean(axis=1)
    return float(np.mean(10 * np.log10(1 / np.maximum(errors, 1e-12))))


class Calls:
    """Counts the rows that a denoiser evaluates, beneath whatever is attached."""

    def __init__(self, pipeline: Any) -> None:
        self.rows: list[int] = []
        self._hook = pipeline.transformer.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows.append((args[0] if args else kwargs["hidden_states"]).shape[0])

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


@pytest.fixture
def attached(tiny: Any) -> Iterator[Any]:
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
    yield engine
    engine.remove()


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
