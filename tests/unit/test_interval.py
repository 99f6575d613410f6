"""The schedule of the interval method, and the refusals of every setting that came with FastCache and calibrations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from toys import ALL_FAMILIES, LEVELS, ScriptedTransformer, Toy, attached, counted, scripted_engine

from xfuser.config import CacheConfig
from xfuser.model_executor.cache import apply_cache_on_pipeline, apply_cache_on_transformer

ADA = {"enable_adacorrection": True}
GATE = ADA | {"adacorr_mode": "gate"}


def evaluated_steps(steps: int, **settings: Any) -> list[int]:
    transformer = ScriptedTransformer(lambda step: 1.0, lambda step: 2.0)
    engine = scripted_engine(transformer, use_cache="Interval", **settings)
    transformer.run([1.0] * steps)
    plan = engine.summary()["plan"]["0"]
    engine.remove()
    assert all(row[0] == row[1] for row in plan)
    assert [block.calls for block in transformer.blocks] == [sum(row[0] for row in plan)] * 2
    return [step for step, row in enumerate(plan) if row[0]]


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [
        (3, 14, [0, 1, 2, 5, 8, 11, 13]),
        (3, 12, [0, 1, 2, 5, 8, 11]),
        (5, 14, [0, 1, 2, 7, 12, 13]),
        (2, 8, [0, 1, 2, 4, 6, 7]),
        (2, 9, [0, 1, 2, 4, 6, 8]),
        (1, 6, [0, 1, 2, 3, 4, 5]),
        (100, 10, [0, 1, 2, 9]),
        (3, 2, [0, 1]),
        (3, 1, [0]),
    ],
)
def test_the_first_three_every_nth_and_the_last(interval: int, steps: int, expected: list[int]) -> None:
    assert evaluated_steps(steps, interval=interval, num_steps=steps) == expected


def test_three_is_the_default() -> None:
    assert evaluated_steps(9, num_steps=9) == [0, 1, 2, 5, 8]


def test_without_a_known_end_the_last_step_is_like_the_others() -> None:
    assert evaluated_steps(9, interval=4) == [0, 1, 2, 6]
    transformer = ScriptedTransformer(lambda step: 1.0)
    engine = scripted_engine(transformer, use_cache="Interval")
    transformer.run([1.0] * 3)
    rules_off = engine.summary()["rules_off"]
    engine.remove()
    assert rules_off == ["the last step is whole"]


def test_the_whole_stack_is_reused() -> None:
    transformer = ScriptedTransformer(lambda step: 1.0 + step, lambda step: 10.0 * step)
    engine = scripted_engine(transformer, use_cache="Interval", interval=3, num_steps=8)
    outputs = transformer.run([float(2**step) for step in range(8)])
    engine.remove()
    residuals = [1 + 11 * step for step in (0, 1, 2, 2, 2, 5, 5, 7)]
    assert outputs == pytest.approx([2**step + residual for step, residual in enumerate(residuals)])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_on_every_family(toy: Toy, level: str) -> None:
    steps = 9
    expected = toy.plain_images(steps)
    known = {"num_steps": steps} if level == "transformer" else {}
    with counted(toy) as counts, attached(toy.pipeline, level, "Interval", interval=2, **known) as engine:
        images = toy.images(steps)
        (plan,) = engine.summary()["plan"].values()
    assert [step for step, row in enumerate(plan) if all(row)] == [0, 1, 2, 4, 6, 8]
    assert counts == [6] * len(toy.blocks)
    assert 0 < np.abs(images - expected).mean() < 0.1
    with attached(toy.pipeline, level, "Interval", interval=1, **known) as engine:
        assert np.array_equal(toy.images(steps), expected)


# -- refusals ------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    # Out of range, or no number.
    *(
        ({"use_cache": "Fast", "motion_threshold": bad}, "motion_threshold")
        for bad in (-0.1, math.nan, math.inf, "0.1")
    ),
    ({"use_cache": "Fast", "motion_threshold": True}, "motion_threshold"),
    *(
        ({"use_cache": "Fast", "significance": bad}, "significance")
        for bad in (-0.01, 1.01, math.nan, None, "0.05", True)
    ),
    *(({"use_cache": "Fast", "adaptive_threshold": bad}, "adaptive_threshold") for bad in (1, "yes", None)),
    *(({"use_cache": "Interval", "interval": bad}, "interval") for bad in (0, -1, 2.0, True, None, "3")),
    *(({"use_cache": "Fast", "sync": bad}, "sync") for bad in ("block", None, True)),
    *((GATE | {"granularity": bad}, "granularity") for bad in ("block", None, "Token")),
    ({"use_cache": "Fast", "approximation": "affine"}, "approximation"),
    (ADA | {"adacorr_mode": "gates"}, "adacorr_mode"),
    (GATE | {"adacorr_tolerance": -1}, "adacorr_tolerance"),
    # Without the method that reads it.
    *(
        ({"use_cache": method, "motion_threshold": 0.1}, "motion_threshold")
        for method in (None, "Tea", "Fb", "Interval")
    ),
    *(({"use_cache": method, "significance": 0.1}, "significance") for method in (None, "Tea", "Fb", "Interval")),
    *(
        ({"use_cache": method, "adaptive_threshold": True}, "adaptive_threshold")
        for method in (None, "Tea", "Interval")
    ),
    *(({"use_cache": method, "interval": 5}, "interval") for method in (None, "Tea", "Fb", "Fast")),
    *(({"use_cache": method, "sync": "layer"}, "sync") for method in (None, "Tea", "Fb", "Interval")),
    ({"use_cache": "Fast", "sync": "layer"} | ADA, "sync"),
    ({"use_cache": "Fast", "sync": "layer", "adacorr_tolerance": 0.1} | ADA, "sync"),
    ({"granularity": "token"}, "granularity"),
    ({"granularity": "token"} | ADA, "granularity"),
    ({"granularity": "token", "use_cache": "Fast", "adacorr_tolerance": 0.1} | ADA, "granularity"),
    ({"approximation": "fitted"}, "calibration"),
    ({"approximation": "fitted", "use_cache": "Fast"} | GATE, "calibration"),
    (GATE | {"adacorr_budget": 0.5}, "adacorr_budget"),
    ({"adacorr_mode": "gate"}, "adacorr_mode"),
    # A calibration that nothing would read: the whole first generation for nothing.
    *(({"use_cache": method, "calibration": "first"}, "calibration") for method in (None, "Fb", "Interval")),
]


@pytest.mark.parametrize("apply_on", LEVELS)
@pytest.mark.parametrize(("settings", "word"), BAD, ids=str)
def test_a_bad_setting_is_refused_before_anything_changes(
    dit: Toy, settings: dict[str, Any], word: str, apply_on: str
) -> None:
    parts = [*dit.transformer.modules(), dit.scheduler]
    before = [dict(vars(part)) for part in parts]
    with pytest.raises(ValueError) as caught:
        try:
            if apply_on == "pipeline":
                apply_cache_on_pipeline(dit.pipeline, **settings).remove()
            else:
                apply_cache_on_transformer(dit.transformer, **settings).remove()
        finally:
            after = [dict(vars(part)) for part in parts]
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert [each.keys() for each in after] == [each.keys() for each in before]
    assert all(now[name] is value for now, old in zip(after, before, strict=True) for name, value in old.items())


def test_what_is_allowed() -> None:
    for settings in (
        {"use_cache": "Fast", "motion_threshold": 0},
        {"use_cache": "Fast", "motion_threshold": 3.0, "significance": 0},
        {"use_cache": "Fast", "significance": 1.0, "sync": "layer", "adaptive_threshold": True},
        {"use_cache": "Fast", "calibration": "first"},
        {"use_cache": "Tea", "calibration": "first"},
        {"use_cache": "Fb", "calibration": "first", "approximation": "fitted"},
        {"use_cache": "Interval", "interval": 1},
        {"use_cache": None, "interval": 3, "sync": "step", "granularity": "layer", "significance": 0.05},
        GATE | {"use_cache": "Fb", "sync": "layer", "granularity": "token", "adacorr_tolerance": 0},
        ADA | {"calibration": "first"},
    ):
        CacheConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "mode", "stand_in"),
    [
        ({"use_cache": "Fast"}, None, "linear"),
        ({"use_cache": "Interval"}, None, "residual"),
        ({"use_cache": "Fast", "calibration": "first"}, None, "linear"),
        ({"use_cache": "Tea", "calibration": "first"}, None, "residual"),
        ({"use_cache": "Fast"} | ADA, "budget", "taylor-1"),
        ({"use_cache": "Fast", "calibration": "first"} | ADA, "budget", "fitted"),
        (GATE, "gate", "taylor-1"),
        (GATE | {"adacorr_tolerance": 0.1, "calibration": "a.safetensors"}, "gate", "fitted"),
        ({"use_cache": "Fast", "approximation": "residual"}, None, "residual"),
    ],
    ids=str,
)
def test_what_follows_from_what_is_named(settings: dict[str, Any], mode: str | None, stand_in: str) -> None:
    config = CacheConfig(**settings)
    assert (config.mode, config.predictor) == (mode, stand_in)
