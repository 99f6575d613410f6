"""What a setting that is left out means: thresholds by method and family, the kind of score by mode; γ and λ on it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from toys import ALL_FAMILIES, Toy, attached, scripted_engine
from toys import ScriptedTransformer as Scripted

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import SPECS, spec_of
from xfuser.model_executor.cache import apply_cache_on_transformer
from xfuser.model_executor.pipelines import MODEL_TYPES
from xfuser.model_executor.pipelines.loading import load_pipeline

METHODS = ("Fast", "Tea", "Fb")
BLEND: dict[str, Any] = {"enable_adacorrection": True, "adacorr_mode": "blend"}
STEPS = 6


# -- thresholds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_threshold_that_is_left_out_is_the_command_lines(toy: Toy, method: str) -> None:
    for left_out in ({}, {"rel_l1_thresh": None}):
        with attached(toy.pipeline, "transformer", method, **left_out) as engine:
            assert engine.config.rel_l1_thresh == MODEL_TYPES[toy.family].thresholds[method]
            assert engine.summary()["rel_l1_thresh"] == MODEL_TYPES[toy.family].thresholds[method]


@pytest.mark.parametrize("method", METHODS)
def test_the_shipped_model_has_its_own(method: str) -> None:
    transformer = load_pipeline("tiny-dit").pipeline.transformer
    spec = spec_of(transformer)
    assert spec.threshold(method, transformer) == MODEL_TYPES["tiny-dit"].thresholds[method]
    assert MODEL_TYPES["tiny-dit"].thresholds != MODEL_TYPES["dit"].thresholds


def test_every_family_of_the_command_line_names_all_of_them() -> None:
    for kind in MODEL_TYPES.values():
        assert set(SPECS[kind.transformer_class].thresholds) == set(kind.thresholds) == set(METHODS)


def test_one_that_is_named_is_taken(dit: Toy) -> None:
    for threshold in (0, 0.3):
        with attached(dit.pipeline, "pipeline", "Tea", rel_l1_thresh=threshold) as engine:
            assert engine.config.rel_l1_thresh == threshold


@pytest.mark.parametrize("method", [None, "Interval"])
def test_a_method_without_a_threshold_has_none(dit: Toy, method: str | None) -> None:
    with attached(dit.pipeline, "transformer", method) as engine:
        assert engine.summary()["rel_l1_thresh"] is None


def test_a_family_that_names_none_takes_the_common_one() -> None:
    assert scripted_engine(Scripted(lambda step: 1.0), use_cache="Tea").config.rel_l1_thresh == 0.05


def test_teacache_on_flux_hits_as_its_description_has_it(flux: Toy) -> None:
    """At .05 it never does: its polynomial is .26 where nothing has changed."""
    hit_rates = []
    for settings in ({}, {"rel_l1_thresh": 0.05}):
        with attached(flux.pipeline, "transformer", "Tea", num_steps=STEPS, **settings) as engine:
            flux.images(STEPS)
            hit_rates.append(engine.summary()["hit_rate"])
    assert hit_rates[0] > 0.3 and hit_rates[1] == 0


# -- the score -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "named", "score"),
    [
        ("blend", None, "absolute"),
        ("blend", "relative", "relative"),
        ("gate", None, "relative"),
        ("gate", "absolute", "absolute"),
        ("budget", None, "relative"),
        ("bound", None, "relative"),
    ],
)
def test_the_score_in_force(mode: str, named: str | None, score: str) -> None:
    assert CacheConfig(enable_adacorrection=True, adacorr_mode=mode, adacorr_score=named).score == score


# -- γ and λ, as the description has them --------------------------------------------------------------------------


def blended(toy: Toy, **settings: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights and scores of every step after the first, by block."""
    with attached(toy.pipeline, "pipeline", None, **BLEND, **settings) as engine:
        toy.images(STEPS)
        summary = engine.summary()
    (weights,), (offsets,) = summary["weights"].values(), summary["offsets"].values()
    return np.array(weights[1:], float), np.array(offsets[1:], float)


def first(toy: Toy, **settings: float) -> tuple[float, float]:
    """Weight and score of the first block at its second step: until there, nothing depends on γ and λ."""
    weights, offsets = blended(toy, **settings)
    return float(weights[0, 0]), float(offsets[0, 0])


def test_the_weight_is_clipped_gamma_times_the_score(dit: Toy) -> None:
    for gamma in (0.05, 0.5, 1.0, 2.0):
        weights, offsets = blended(dit, adacorr_gamma=gamma)
        np.testing.assert_allclose(weights, np.clip(gamma * offsets, 0, 1), rtol=1e-6)


def test_a_larger_gamma_corrects_more(dit: Toy) -> None:
    """Until it takes the fresh output alone. The score itself does not know γ."""
    (low, score), (middle, same), (high, again) = (first(dit, adacorr_gamma=gamma) for gamma in (0.05, 0.1, 100.0))
    assert score == same == again
    assert middle == pytest.approx(2 * low)
    assert 0 < low < middle < high == 1.0


def test_a_larger_lambda_gives_the_spatial_variation_more_weight(dit: Toy) -> None:
    """S = Δ_temp² + λ·Δ_spatial, so equal steps of λ are equal steps of S, by the spatial variation."""
    none, half, whole, twice = (first(dit, adacorr_gamma=0.05, adacorr_lambda=value)[1] for value in (0, 0.5, 1, 2))
    assert whole - none == pytest.approx(2 * (half - none)) == pytest.approx((twice - none) / 2)
    assert 0 < none < half < whole < twice


def test_a_smaller_lambda_reuses_more_not_less(dit: Toy) -> None:
    """By its own equations; its sensitivity table has it the other way round."""
    less, more = (blended(dit, adacorr_gamma=0.1, adacorr_lambda=value)[0].mean() for value in (0.5, 1.0))
    assert less < more < 1


def test_gamma_and_lambda_of_1_draw_what_no_cache_draws() -> None:
    """As the description's call has them. With relative scores the weights would be about 0, and the image 18 dB."""
    pipeline = load_pipeline("tiny-dit").pipeline

    def images() -> np.ndarray:
        torch.manual_seed(0)
        return np.asarray(pipeline([3], num_inference_steps=8, output_type="np").images)

    expected = images()
    engine = apply_cache_on_transformer(
        pipeline.transformer, "Fast", **BLEND, adacorr_gamma=1.0, adacorr_lambda=1.0, num_steps=8
    )
    psnr = -10 * math.log10(max(float(((images() - expected) ** 2).mean()), 1e-12))
    engine.remove()
    assert psnr > 30
