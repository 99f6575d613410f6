"""Pipelines and calls that do not step as most do: learned all the same, evaluated in full, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import diffusers as df
import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from pipeline_zoo import ZOO
from pipeline_zoo_parts import ARRAY, PROMPT, picture, small_unet, stable_diffusion_parts, wake
from trajectories import own_store  # noqa: F401

from xfuser import apply_cache_on_pipeline
from xfuser.model_executor.adapters.dit import build_small as build_toy_dit
from xfuser.model_executor.adapters.small import seeded
from xfuser.model_executor.cache.adacorrection.trajectory.following import denoiser_names

STEPS = 8
OTHER_STEPS = (df.AmusedScheduler(mask_token_id=3), df.VQDiffusionScheduler(num_vec_classes=8), df.KarrasVeScheduler())
pytestmark = pytest.mark.usefixtures("own_store")


class Plain(df.DDIMPipeline):
    """A loop of its own, in the form of diffusers'."""

    loops, spared, channels, fails = 1, 0, 3, False
    interrupt = False

    @torch.no_grad()
    def __call__(self, seed: int = 0) -> np.ndarray:
        calls: list[int] = []
        hook = self.unet.register_forward_hook(lambda *_: calls.append(1))
        for loop in range(self.loops):
            generator = torch.Generator().manual_seed(seed + loop)
            latents = torch.randn(1, 3, 16, 16, generator=generator)
            self.scheduler.set_timesteps(STEPS)
            timesteps = self.scheduler.timesteps
            for timestep in timesteps[: len(timesteps) - self.spared]:
                output = self.unet(latents, timestep).sample
                latents = self.scheduler.step(output[:, : self.channels], timestep, latents).prev_sample
        hook.remove()
        self.calls = len(calls)
        if self.fails and len(calls) < STEPS:
            raise RuntimeError("a step has no attention maps")
        return latents.numpy()


@pytest.fixture
def unet() -> Any:
    with seeded(0):
        module = small_unet().eval()
        wake(module)
        return module


@pytest.fixture
def build(unet: Any) -> Iterator[Callable[..., tuple[Any, Any]]]:
    engines = []

    def attach(**form: Any) -> tuple[Any, Any]:
        kind = type("Formed", (Plain,), form)
        engine = apply_cache_on_pipeline(kind(unet, df.DDIMScheduler()), adacorr_budget=0.5, calibration="first")
        engines.append(engine)
        return engine.pipeline, engine

    yield attach
    for engine in engines:
        engine.remove()


def in_full(engine: Any, said: str) -> None:
    summary = engine.summary()
    assert said in summary["not_learned_because"] and summary["evaluated_share"] == 1


# -- loops ---------------------------------------------------------------------------------------------------------


def test_of_several_loops_in_one_call_the_last_is_learned(build: Any) -> None:
    pipeline, engine = build(loops=3)
    exact = pipeline(seed=5)
    assert pipeline.calls == 2 * STEPS + engine.config.adacorr_budget * STEPS  # the replay's: two loops in full
    pipeline(seed=5)
    learned = engine.summary()["weights"]
    assert pipeline.calls == 3 * engine.summary()["evaluated_steps"] < 2 * STEPS
    engine.remove()
    alone, other = build()
    assert np.array_equal(alone(seed=7), exact)
    alone(seed=7)
    assert learned == other.summary()["weights"]


def test_a_pipeline_that_leaves_out_the_last_step_is_learned(build: Any) -> None:
    pipeline, engine = build(spared=1)
    pipeline()
    pipeline()
    assert engine.summary()["evaluated_share"] <= 0.5
    assert pipeline.calls == engine.summary()["evaluated_steps"]


@pytest.mark.parametrize("form", [{"spared": 1, "interrupt": True}, {"spared": 2}])
def test_what_was_interrupted_is_not_learned(form: dict[str, Any], build: Any, caplog: Any) -> None:
    pipeline, engine = build(**form)
    first = pipeline()
    assert np.array_equal(pipeline(), first) and engine.summary()["evaluated_share"] == 1
    assert "it stopped after" in caplog.text


def test_an_end_that_was_asked_for_is_learned_and_another_end_is_no_error(build: Any) -> None:
    pipeline, engine = build(spared=3, denoising_end=0.6)
    pipeline()
    pipeline()
    assert engine.summary()["steps"] == STEPS - 3 and engine.summary()["evaluated_share"] < 0.7
    type(pipeline).spared = 0
    assert np.isfinite(pipeline()).all() and engine.summary()["steps"] == STEPS


# -- forms that change ---------------------------------------------------------------------------------------------


def stable_diffusion() -> Any:
    with seeded(0):
        pipeline = ZOO["StableDiffusionPipeline"].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ask(pipeline: Any, seed: int = 0, **more: Any) -> np.ndarray:
    case, generator = ZOO["StableDiffusionPipeline"], torch.Generator().manual_seed(seed)
    arguments = {**case.arguments(), "num_inference_steps": STEPS, "generator": generator, **more}
    return case.output(pipeline(**arguments))


def test_guidance_that_ends_midway_is_evaluated_in_full_from_there(caplog: Any) -> None:
    pipeline = stable_diffusion()
    cutoff = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)}
    cutoff["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    plain = ask(pipeline, **cutoff)
    engine = apply_cache_on_pipeline(pipeline, adacorr_budget=0.5)
    assert np.array_equal(ask(pipeline, **cutoff), plain)  # neither learned from …
    assert "changes its form" in caplog.text and engine.summary()["learned_generations"] == 0
    ask(pipeline)
    cached = ask(pipeline)
    assert engine.summary()["evaluated_share"] <= 0.5
    cut = ask(pipeline, **cutoff)  # … nor broken by, in the middle of a plan
    assert np.isfinite(cut).all() and "changes its form" in engine.summary()["not_learned_because"]
    assert np.array_equal(ask(pipeline), cached)
    engine.remove()


def test_what_the_scheduler_receives_may_not_fit(build: Any) -> None:
    pipeline, engine = build(channels=1)
    first = pipeline()
    assert np.array_equal(pipeline(), first)
    in_full(engine, "has not the latent's form")


# -- a replay that fails -------------------------------------------------------------------------------------------


def test_an_image_is_not_lost_where_nothing_can_be_learned(build: Any, caplog: Any) -> None:
    pipeline, engine = build(fails=True)
    first = pipeline()
    assert "evaluated in full (a step has no attention maps)" in caplog.text
    assert np.array_equal(pipeline(), first) and pipeline.calls == STEPS
    in_full(engine, "a step has no attention maps")
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


# -- parts that are no denoisers, schedulers that do not step --------------------------------------------------------


def test_an_adapter_is_no_denoiser() -> None:
    with seeded(0):
        parts = stable_diffusion_parts(df.DDIMScheduler())
        adapter = df.T2IAdapter(
            in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
        )
        pipeline = df.StableDiffusionAdapterPipeline(**parts, adapter=adapter)
    assert denoiser_names(pipeline) == ["unet"]


def test_a_scheduler_that_only_adds_noise_is_none_to_follow() -> None:
    with seeded(0):
        parts = stable_diffusion_parts(df.DDIMScheduler(), in_channels=7, num_class_embeds=1000)
        del parts["requires_safety_checker"]
        pipeline = df.StableDiffusionUpscalePipeline(**parts, low_res_scheduler=df.DDPMScheduler())
        wake(pipeline.unet)
    pipeline.set_progress_bar_config(disable=True)
    engine = apply_cache_on_pipeline(pipeline, adacorr_budget=0.5)
    for seed in (0, 1):
        torch.manual_seed(seed)
        images = pipeline(**PROMPT, **ARRAY, image=picture(), num_inference_steps=STEPS).images
    assert np.isfinite(images).all() and engine.summary()["evaluated_share"] <= 0.5
    engine.remove()


@pytest.mark.parametrize("scheduler", OTHER_STEPS, ids=lambda each: type(each).__name__)
def test_steps_that_are_not_from_latent_to_latent_are_refused(scheduler: Any) -> None:
    pipeline = build_toy_dit()
    pipeline.scheduler = scheduler
    with pytest.raises(TypeError, match=f"^DiTPipeline: a cache cannot follow {type(scheduler).__name__}, [^\n]*$"):
        apply_cache_on_pipeline(pipeline, target_speedup=2)
    assert "step" not in vars(scheduler)


def test_copies_of_the_scheduler_are_refused(unet: Any) -> None:
    class Copying(Plain):
        def __call__(self, seed: int = 0) -> Any:
            copied = deepcopy(self.scheduler)
            return copied.step(self.unet(torch.zeros(1, 3, 16, 16), 0).sample, 0, torch.zeros(1, 3, 16, 16))

    with pytest.raises(TypeError, match="two schedulers"):
        apply_cache_on_pipeline(Copying(unet, df.DDIMScheduler()), target_speedup=2)
