"""`apply_cache_on_transformer` under xDiT's path: it returns the transformer, replaces, and says what it leaves out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from torch import nn
from toys import ALL_FAMILIES, ALWAYS, Toy, attached

import xfuser
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_transformer

PATH = "xfuser.model_executor.cache.diffusers_adapters"
STEPS = 8
Apply = Callable[..., nn.Module]


def path_of(family: str) -> Apply:
    return import_module(f"{PATH}.{family}").apply_cache_on_transformer


@pytest.fixture(params=["flux", ""])
def apply(request: pytest.FixtureRequest, flux: Toy) -> Iterator[Apply]:
    """The function under FLUX's path, and the one above all families'; what it leaves attached is taken off."""
    yield path_of("flux") if request.param else import_module(PATH).apply_cache_on_transformer
    if "forward" in vars(flux.transformer):
        xfuser.cache_engine_of(flux.transformer).remove()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_transformer_is_returned_and_has_the_engine(flux: Toy, apply: Apply) -> None:
    before = flux.transformer
    flux.pipeline.transformer = apply(flux.pipeline.transformer, rel_l1_thresh=0.125, num_steps=STEPS)
    assert flux.pipeline.transformer is before
    engine = xfuser.cache_engine_of(flux.pipeline.transformer)
    assert isinstance(engine, CacheEngine)
    assert (engine.config.use_cache, engine.config.rel_l1_thresh) == ("Fb", 0.125)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_path_caches_with_first_block_by_default(toy: Toy) -> None:
    apply = path_of(toy.family)
    assert inspect.signature(apply).parameters["use_cache"].default == "Fb"
    apply(toy.transformer, rel_l1_thresh=ALWAYS, return_hidden_states_first=False, num_steps=STEPS)
    engine = xfuser.cache_engine_of(toy.transformer)
    toy.images(STEPS)
    assert engine.summary()["method"] == "Fb" and engine.summary()["hit_rate"] > 0.3
    engine.remove()
    assert "forward" not in vars(toy.transformer)


def test_applying_again_replaces(flux: Toy, apply: Apply, caplog: pytest.LogCaptureFixture) -> None:
    expected = flux.plain_images(STEPS)
    with attached(flux.pipeline, "transformer", "Tea", num_steps=STEPS):
        alone = flux.images(STEPS)
    caplog.set_level(logging.INFO, "xfuser")
    apply(flux.transformer, use_cache="Fb")
    assert lines(caplog) == []
    first = xfuser.cache_engine_of(flux.transformer)
    apply(flux.transformer, use_cache="Tea", num_steps=STEPS)
    (line,) = lines(caplog)
    assert "'Fb'" in line and "replaced" in line
    second = xfuser.cache_engine_of(flux.transformer)
    assert second is not first and second.config.use_cache == "Tea"
    assert np.array_equal(flux.images(STEPS), alone)
    assert first.summary()["calls"] == 0
    second.remove()
    assert np.array_equal(flux.images(STEPS), expected)


def test_what_is_refused_leaves_the_one_before_in_place(flux: Toy, apply: Apply) -> None:
    apply(flux.transformer, use_cache="Tea")
    before = xfuser.cache_engine_of(flux.transformer)
    refused: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"rel_l1_thresh": -1}, ValueError),
        ({"rel_l1_tresh": 0.1}, TypeError),
        ({"return_hidden_states_first": True}, ValueError),
        ({"use_cache": "Fast", "calibration": "/nowhere.safetensors", "num_steps": 8}, ValueError),
        ({"use_cache": "Magic"}, ValueError),
        ({"use_cache": "Fast", "enable_token_merge": True}, ValueError),
    ]
    for settings, error in refused:
        with pytest.raises(error):
            apply(flux.transformer, **settings)
        assert xfuser.cache_engine_of(flux.transformer) is before


@pytest.mark.parametrize("method", ["Fb", "Tea"])
def test_settings_of_fastcache_are_named_and_ignored(
    flux: Toy, apply: Apply, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The authors' benchmark gives them to every method, and would print an uncached row where they are refused."""
    apply(flux.transformer, rel_l1_thresh=ALWAYS, num_steps=STEPS, use_cache=method, motion_threshold=0.1)
    (line,) = lines(caplog)
    assert "motion_threshold" in line and repr(method) in line
    flux.images(STEPS)
    assert xfuser.cache_engine_of(flux.transformer).summary()["hit_rate"] > 0.3


def test_settings_of_a_correction_that_is_off_are_named_and_ignored(
    flux: Toy, apply: Apply, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = {"enable_adacorrection": False, "adacorr_gamma": 2.0, "adacorr_lambda": 1.0}
    apply(flux.transformer, use_cache="Fast", motion_threshold=0.1, **theirs)
    (line,) = lines(caplog)
    assert "adacorr_gamma" in line and "adacorr_lambda" not in line


def test_settings_of_fastcache_are_read_by_it(flux: Toy, apply: Apply, caplog: pytest.LogCaptureFixture) -> None:
    theirs = {"significance_level": 0.1, "enable_enhanced_linear_approx": True, "enable_token_merge": False}
    apply(flux.transformer, use_cache="Fast", motion_threshold=0.1, token_merge_k=5, merge_ratio=0.5, **theirs)
    config = xfuser.cache_engine_of(flux.transformer).config
    assert (config.motion_threshold, config.significance, config.predictor) == (0.1, 0.1, "linear")
    assert lines(caplog) == []


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3"])
def test_another_familys_transformer_is_cached_and_said_so(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    """The authors' benchmark imports FLUX's for PixArt and SD3 as well, and catches what it raises."""
    path_of("flux")(toy.transformer, rel_l1_thresh=ALWAYS, return_hidden_states_first=False, num_steps=STEPS)
    (line,) = lines(caplog)
    assert "FluxTransformer2DModel" in line and type(toy.transformer).__name__ in line
    toy.images(STEPS)
    engine = xfuser.cache_engine_of(toy.transformer)
    assert engine.summary()["hit_rate"] > 0.3
    engine.remove()


def test_what_is_no_transformer_is_refused(flux: Toy, apply: Apply) -> None:
    for wrong in (flux.pipeline, nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match="pipeline.transformer"):
            apply(wrong)


def test_without_a_cache_there_is_no_engine(flux: Toy) -> None:
    with pytest.raises(ValueError, match="has no cache attached"):
        xfuser.cache_engine_of(flux.transformer)


@pytest.mark.parametrize("level", ["transformer", "pipeline"])
def test_the_engine_is_found_whoever_attached_it(flux: Toy, level: str) -> None:
    with attached(flux.pipeline, level, "Tea") as engine:
        assert xfuser.cache_engine_of(flux.transformer) is engine


def test_this_engines_own_function_returns_the_engine_and_refuses(flux: Toy) -> None:
    engine = apply_cache_on_transformer(flux.transformer, "Tea")
    assert isinstance(engine, CacheEngine)
    with pytest.raises(ValueError, match="remove"):
        xfuser.apply_cache_on_transformer(flux.transformer, "Tea")
    with pytest.raises(ValueError, match="motion_threshold"):
        xfuser.apply_cache_on_transformer(flux.transformer, "Tea", motion_threshold=0.1)
    assert xfuser.cache_engine_of(flux.transformer) is engine
    engine.remove()
