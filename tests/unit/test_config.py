"""Every refusal: what it says, and that it changes nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from toys import Toy

from xfuser.config import CacheConfig
from xfuser.model_executor.cache import apply_cache_on_pipeline, apply_cache_on_transformer

ADA = {"enable_adacorrection": True}
BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"rel_l1_thresh": -0.1}, "rel_l1_thresh"),
    ({"rel_l1_thresh": math.nan}, "rel_l1_thresh"),
    ({"rel_l1_thresh": math.inf}, "rel_l1_thresh"),
    ({"rel_l1_thresh": "0.1"}, "rel_l1_thresh"),
    ({"rel_l1_thresh": True}, "rel_l1_thresh"),
    ({"num_steps": 0}, "num_steps"),
    ({"num_steps": -3}, "num_steps"),
    ({"num_steps": 2.5}, "num_steps"),
    ({"num_steps": True}, "num_steps"),
    ({"return_hidden_states_first": "yes"}, "return_hidden_states_first"),
    ({"return_hidden_states_first": 1}, "return_hidden_states_first"),
    ({"enable_adacorrection": "on"}, "enable_adacorrection"),
    ({"enable_adacorrection": None}, "enable_adacorrection"),
    ({"approximation": "taylor-3"}, "approximation"),
    ({"approximation": "activation"}, "approximation"),
    ({**ADA, "adacorr_mode": "strict"}, "adacorr_mode"),
    ({**ADA, "adacorr_score": "Relative"}, "adacorr_score"),
    ({**ADA, "adacorr_gamma": 0}, "adacorr_gamma"),
    ({**ADA, "adacorr_gamma": -1.0}, "adacorr_gamma"),
    ({**ADA, "adacorr_gamma": math.nan}, "adacorr_gamma"),
    ({**ADA, "adacorr_lambda": -0.5}, "adacorr_lambda"),
    ({**ADA, "adacorr_lambda": math.nan}, "adacorr_lambda"),
    ({**ADA, "adacorr_tolerance": -0.01}, "adacorr_tolerance"),
    ({**ADA, "adacorr_tolerance": math.nan}, "adacorr_tolerance"),
    ({**ADA, "adacorr_budget": -0.01}, "adacorr_budget"),
    ({**ADA, "adacorr_budget": 1.01}, "adacorr_budget"),
    ({**ADA, "adacorr_budget": math.nan}, "adacorr_budget"),
]
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({**ADA, "adacorr_tolerance": 0.1, "adacorr_budget": 0.5}, "exclude each other"),
    ({"adacorr_tolerance": 0.1}, "enable_adacorrection=True"),
    ({"adacorr_budget": 0.5}, "enable_adacorrection=True"),
    ({"adacorr_mode": "bound"}, "enable_adacorrection=True"),
    ({**ADA, "adacorr_mode": "budget", "adacorr_tolerance": 0.1}, "bound"),
    ({**ADA, "adacorr_mode": "bound", "adacorr_budget": 0.1}, "budget"),
    ({**ADA, "adacorr_mode": "blend", "adacorr_tolerance": 0.1}, "bound"),
    ({**ADA, "adacorr_mode": "blend", "adacorr_budget": 0.1}, "budget"),
]


def state_of(toy: Toy) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in toy.transformer.modules()] + [dict(vars(toy.scheduler))]


def refused(toy: Toy, apply: Callable[[], Any], error: type[Exception], *words: str) -> None:
    """The call raises, its message has all the words, and no attribute of the pipeline has changed."""
    before = state_of(toy)
    with pytest.raises(error) as caught:
        apply()
    for word in words:
        assert word in str(caught.value)
    after = state_of(toy)
    assert [sorted(attributes) for attributes in after] == [sorted(attributes) for attributes in before]
    assert all(now[name] is value for now, old in zip(after, before, strict=True) for name, value in old.items())


@pytest.mark.parametrize(("settings", "word"), BAD_VALUES + CONTRADICTIONS)
def test_bad_settings_are_refused(dit: Toy, settings: dict[str, Any], word: str) -> None:
    refused(dit, lambda: apply_cache_on_transformer(dit.transformer, "Tea", **settings), ValueError, word)
    refused(dit, lambda: apply_cache_on_pipeline(dit.pipeline, "Fb", **settings), ValueError, word)
    with pytest.raises(ValueError):
        CacheConfig(**settings)


def test_a_range_is_named(dit: Toy) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        CacheConfig(enable_adacorrection=True, adacorr_budget=2)
    with pytest.raises(ValueError, match="at least 0"):
        CacheConfig(rel_l1_thresh=-1)


def test_an_unknown_keyword_lists_the_known_ones(dit: Toy) -> None:
    known = [field.name for field in dataclasses.fields(CacheConfig)]
    for apply, target in ((apply_cache_on_transformer, dit.transformer), (apply_cache_on_pipeline, dit.pipeline)):
        refused(dit, lambda a=apply, t=target: a(t, "Tea", rel_l1_tresh=0.1), TypeError, "rel_l1_tresh", *known)


@pytest.mark.parametrize("method", ["tea", "FBCache", "", "nonsense"])
def test_an_unknown_method_lists_the_known_ones(dit: Toy, method: str) -> None:
    for apply, target in ((apply_cache_on_transformer, dit.transformer), (apply_cache_on_pipeline, dit.pipeline)):
        refused(dit, lambda a=apply, t=target: a(t, method), ValueError, repr(method), "'Tea'", "'Fb'")


def test_what_is_no_supported_transformer(dit: Toy) -> None:
    supported = ("DiTTransformer2DModel", "FluxTransformer2DModel")
    for wrong in (dit.pipeline, dit.pipeline.vae, nn.Linear(2, 2), None, "facebook/DiT-XL-2-256"):
        name = type(wrong).__name__
        refused(
            dit,
            lambda w=wrong: apply_cache_on_transformer(w, "Tea"),
            TypeError,
            name,
            "pipeline.transformer",
            *supported,
        )


def test_what_is_no_pipeline_with_a_transformer(dit: Toy) -> None:
    for wrong in (dit.transformer, object(), None):
        refused(dit, lambda w=wrong: apply_cache_on_pipeline(w, "Tea"), TypeError, "transformer", type(wrong).__name__)


def test_the_wrong_return_order(flux: Toy) -> None:
    refused(
        flux,
        lambda: apply_cache_on_transformer(flux.transformer, "Tea", return_hidden_states_first=True),
        ValueError,
        "return_hidden_states_first=True",
        "encoder_hidden_states, hidden_states",
    )
    apply_cache_on_transformer(flux.transformer, "Tea", return_hidden_states_first=False).remove()


@pytest.mark.parametrize("claim", [True, False, None])
def test_a_model_of_one_stream_has_no_return_order(dit: Toy, claim: bool | None) -> None:
    apply_cache_on_transformer(dit.transformer, "Tea", return_hidden_states_first=claim).remove()


def test_a_class_derived_from_a_supported_one_is_supported(dit: Toy) -> None:
    original = type(dit.transformer)
    derived = type("Finetuned", (original,), {})
    dit.transformer.__class__ = derived
    try:
        apply_cache_on_transformer(dit.transformer, "Tea").remove()
    finally:
        dit.transformer.__class__ = original


@pytest.mark.parametrize(
    ("settings", "mode", "stand_in"),
    [
        ({}, None, "residual"),
        (ADA, "budget", "taylor-1"),
        ({**ADA, "adacorr_budget": 0.5}, "budget", "taylor-1"),
        ({**ADA, "adacorr_tolerance": 0.1}, "bound", "taylor-1"),
        ({**ADA, "adacorr_mode": "bound"}, "bound", "taylor-1"),
        ({**ADA, "adacorr_mode": "blend"}, "blend", "activation"),
        ({**ADA, "adacorr_mode": "blend", "approximation": "taylor-2"}, "blend", "taylor-2"),
        ({**ADA, "approximation": "residual"}, "budget", "residual"),
        ({"approximation": "taylor-2"}, None, "taylor-2"),
    ],
)
def test_modes_and_stand_ins_follow_from_what_is_named(
    settings: dict[str, Any], mode: str | None, stand_in: str
) -> None:
    config = CacheConfig(**settings)
    assert (config.mode, config.predictor) == (mode, stand_in)


def test_the_limits_of_every_range_are_allowed() -> None:
    CacheConfig(**ADA, use_cache="Fb", rel_l1_thresh=0, num_steps=1, adacorr_lambda=0, adacorr_gamma=1e-9)
    for budget in (0, 1, 0.0, 1.0):
        CacheConfig(**ADA, adacorr_budget=budget)
    assert CacheConfig(**ADA, adacorr_tolerance=0).tolerance == 0


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig().rel_l1_thresh = 0.2  # type: ignore[misc]


def test_a_whole_config_stands_for_its_settings(dit: Toy) -> None:
    config = CacheConfig("Fb", 0.3, enable_adacorrection=True, adacorr_budget=0.5, num_steps=6)
    for apply, target in ((apply_cache_on_transformer, dit.transformer), (apply_cache_on_pipeline, dit.pipeline)):
        engine = apply(target, config)
        engine.remove()
        assert engine.config == config
        engine = apply(target, use_cache=CacheConfig())
        engine.remove()
        assert engine.config == CacheConfig()
        refused(dit, lambda a=apply, t=target: a(t, config, num_steps=5), TypeError, "num_steps", "CacheConfig")
