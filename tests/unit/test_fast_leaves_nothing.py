"""FastCache: what it may never mix, change or leave behind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import with_sections
from test_fast import LONG, SOME, STEPS
from torch import nn
from toys import (
    ALL_FAMILIES,
    ALWAYS,
    FAMILIES,
    SCRIPTED,
    ScriptedTransformer,
    Toy,
    attached,
    growing_values,
    scripted_engine,
)

from xfuser.config import CacheConfig
from xfuser.model_executor.cache import CacheEngine

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"sync": "layer"},
    {"motion_threshold": 0.3},
    {"motion_threshold": 0.3, "sync": "layer", "adaptive_threshold": True},
    {"motion_threshold": 0.2, "approximation": "taylor-1"},
)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_second_generation_is_as_fresh_as_the_first(toy: Toy, settings: dict[str, Any]) -> None:
    settings = SOME[toy.family] | settings
    level = "pipeline" if "sync" in settings else "transformer"
    with attached(toy.pipeline, level, "Fast", **settings) as engine:
        expected, plan = toy.images(LONG, seed=3), engine.summary()["plan"]
        toy.images(6, seed=5, batch=2)
        assert np.array_equal(toy.images(LONG, seed=3), expected)
        assert engine.summary()["plan"] == plan
        engine.reset()
        assert np.array_equal(toy.images(LONG, seed=3), expected)
        summary = engine.summary()
    assert (summary["plan"], summary["generations"]) == (plan, 1)
    assert 0 < summary["hit_rate"] < 1


@torch.no_grad()
def call_dit(toy: Toy, step: int, steps: int, drift: float, label: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    base, direction = torch.randn(2, 1, 4, 4, 4, generator=generator)
    timestep = torch.tensor([1000 - (step + 1) * 900 // steps])
    return toy.transformer(
        base + drift * step * direction, timestep=timestep, class_labels=torch.tensor([label])
    ).sample


@torch.no_grad()
def call_flux(toy: Toy, step: int, steps: int, drift: float, label: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    base, direction = torch.randn(2, 1, 16, 16, generator=generator)
    generator.manual_seed(label)
    text, pooled = torch.randn(1, 6, 32, generator=generator), torch.randn(1, 32, generator=generator)
    positions = torch.stack((torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4), dim=1)
    with toy.transformer.cache_context(f"branch {label}"):
        return toy.transformer(
            hidden_states=base + drift * step * direction,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([1 - 0.9 * step / steps]),
            img_ids=positions,
            txt_ids=torch.zeros(6, 3),
        ).sample


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_kept_apart(toy: Toy, settings: dict[str, Any]) -> None:
    """Two branches in turn give what each gives alone."""
    steps, call = 9, call_dit if toy.family == "dit" else call_flux
    branches = {3: 0.02, 4: 0.15}
    settings = {"rel_l1_thresh": 0.1, "significance": 0} | settings
    expected, plans = {}, {}
    for label, drift in branches.items():
        with attached(toy.pipeline, "transformer", "Fast", **settings) as engine:
            expected[label] = [call(toy, step, steps, drift, label) for step in range(steps)]
            (plans[label],) = engine.summary()["plan"].values()
    with attached(toy.pipeline, "transformer", "Fast", **settings) as engine:
        outputs = {label: [] for label in branches}
        for step in range(steps):
            for label, drift in branches.items():
                outputs[label].append(call(toy, step, steps, drift, label))
        summary = engine.summary()
    assert (summary["branches"], summary["generations"]) == (2, 1)
    assert list(summary["plan"].values()) == list(plans.values())
    assert 0 < summary["hit_rate"] < 1
    for label in branches:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs[label], expected[label], strict=True))


def everything(toy: Toy) -> list[dict[str, Any]]:
    parts = [*toy.transformer.modules(), toy.scheduler]
    return [{name: dict(v) if isinstance(v, dict) else v for name, v in vars(each).items()} for each in parts]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_removal_leaves_no_attribute(toy: Toy, settings: dict[str, Any]) -> None:
    """On attention modules neither. The scheduler's own schedule is not the cache's doing."""
    toy.images(4)
    before = everything(toy)
    with attached(toy.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, **settings):
        toy.images(4)
    after = everything(toy)
    assert [each.keys() for each in after] == [each.keys() for each in before]
    for now, old in zip(after[:-1], before[:-1], strict=True):
        for name, value in old.items():
            same = now[name] is value or isinstance(value, (dict, int, float, str)) and now[name] == value
            assert same, name
    assert np.array_equal(toy.images(STEPS), toy.plain_images(STEPS))


@pytest.mark.parametrize("sync", ["step", "layer"])
def test_an_input_that_is_not_finite_makes_the_blocks_run(sync: str) -> None:
    """A NaN that passes by skipped blocks is stored nowhere; only their inputs' sums tell of it."""
    transformer = ScriptedTransformer(lambda step: 1.0, lambda step: 1.0)
    engine = scripted_engine(transformer, use_cache="Fast", rel_l1_thresh=ALWAYS, sync=sync)
    for step in range(8):
        sample = torch.full((1, 8, 4), 10.0)
        if step == 5:
            sample[0, 0, 0] = math.nan
        transformer(sample, timestep=torch.tensor(1000 - step))
    plan = engine.summary()["plan"]["0"]
    engine.remove()
    assert [any(row) for row in plan[:5]] == [True, True, True, False, False]
    assert all(plan[5 if sync == "layer" else 6])


class Scaling(nn.Module):
    """A block whose residual is a multiple of its input: of a change of the input, the same multiple."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.factor


@pytest.mark.parametrize("method", ["Interval", "Fb", "Fast"])
def test_calibrated_maps_of_blocks_are_not_taken_for_those_of_stacks(method: str) -> None:
    """Two blocks that undo each other: with exact maps, block by block or not, nothing that stands in can err."""
    transformer = ScriptedTransformer()
    factors = [4.0, 0.25] if method != "Fb" else [2.0, 4.0, 0.25]
    transformer.blocks = nn.ModuleList(Scaling(factor) for factor in factors)
    steps, blocks = 9, len(factors)
    gram = torch.ones(blocks + 2, steps, steps)
    maps = {(block, 0): torch.eye(4) * (factor - 1) for block, factor in enumerate(factors)}
    calibration = with_sections(gram, (1.0,) * blocks, maps)
    settings = {"use_cache": method, "approximation": "linear", "num_steps": steps}
    if method != "Interval":
        settings["rel_l1_thresh"] = ALWAYS
    engine = CacheEngine(transformer, SCRIPTED, CacheConfig.from_keywords(**settings), calibration=calibration)
    values = growing_values([1.5] * (steps - 1))
    outputs = transformer.run(values)
    hit_rate = engine.summary()["hit_rate"]
    engine.remove()
    assert hit_rate > 0.2
    product = math.prod(factors)
    assert outputs == pytest.approx([value * product for value in values], rel=1e-5)


def test_the_shadow_of_fast_under_a_budget_is_fast(dit: Toy) -> None:
    """Without a budget of its own AdaCorrection spends what Fast would, in whole steps: to within two of them here."""
    steps, hit_rates = 40, []
    for correction in ({}, {"enable_adacorrection": True}):
        with attached(dit.pipeline, "pipeline", "Fast", rel_l1_thresh=0.07, **correction) as engine:
            dit.images(steps)
            hit_rates.append(engine.summary()["hit_rate"])
    assert 0.2 < hit_rates[0] < 0.8
    assert hit_rates[1] == pytest.approx(hit_rates[0], abs=0.05)
