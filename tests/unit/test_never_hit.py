"""A cache that must not hit changes no bit of any image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toys import ALL_FAMILIES, ALWAYS, LEVELS, Toy, attached, build_toy_dit, drive

NEVER = {
    "base": {"rel_l1_thresh": 0},
    "budget of the base": {"rel_l1_thresh": 0, "enable_adacorrection": True},
    "tolerance 0": {"rel_l1_thresh": 0, "enable_adacorrection": True, "adacorr_tolerance": 0},
    "tolerance 0 against a base that always hits": {
        "rel_l1_thresh": ALWAYS,
        "enable_adacorrection": True,
        "adacorr_tolerance": 0.0,
    },
    "whole budget": {"rel_l1_thresh": ALWAYS, "enable_adacorrection": True, "adacorr_budget": 1.0},
}
METHODS = ("Tea", "Fb")
STEPS = 5


@pytest.mark.parametrize("settings", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_images_are_bit_identical(toy: Toy, level: str, method: str, settings: dict[str, Any]) -> None:
    expected = toy.plain_images(STEPS, batch=2)
    with attached(toy.pipeline, level, method, **settings) as engine:
        images = toy.images(STEPS, batch=2)
        summary = engine.summary()
    assert np.array_equal(images, expected)
    assert summary["hit_rate"] == 0
    assert summary["flops_saved"] == 0
    assert (summary["generations"], summary["steps"], summary["branches"]) == (1, STEPS, 1)
    assert all(row == [1] * len(toy.blocks) for row in next(iter(summary["plan"].values())))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_no_method_at_all_is_bit_identical(toy: Toy, level: str) -> None:
    expected = toy.plain_images(STEPS, batch=2)
    with attached(toy.pipeline, level, None) as engine:
        images = toy.images(STEPS, batch=2)
        assert engine.summary()["hit_rate"] == 0
    assert np.array_equal(images, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_hits_do_change_the_images(toy: Toy, level: str, method: str) -> None:
    """Without this, the tests above would hold for blocks that contribute nothing."""
    expected = toy.plain_images(STEPS, batch=2)
    with attached(toy.pipeline, level, method, rel_l1_thresh=ALWAYS) as engine:
        images = toy.images(STEPS, batch=2)
        assert engine.summary()["hit_rate"] > 0.4
    assert np.abs(images - expected).max() > 1e-3


@pytest.mark.parametrize("settings", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_one_block(method: str, settings: dict[str, Any]) -> None:
    """Fb's probed block is then all there is."""
    pipeline = build_toy_dit(layers=1)
    expected = drive(pipeline.transformer, 4)
    with attached(pipeline, "transformer", method, **settings) as engine:
        outputs = drive(pipeline.transformer, 4)
        assert engine.summary()["hit_rate"] == 0
    assert all((a == b).all() for a, b in zip(outputs, expected, strict=True))
