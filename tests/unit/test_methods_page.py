"""docs/methods.md says what is so: its defaults, its examples, and what it advises where Fast never hits."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import pytest
from toys import ALWAYS, Toy, attached

from xfuser.config import CacheConfig
from xfuser.config.cache import MODES
from xfuser.config.methods import METHODS
from xfuser.model_executor.cache.adacorrection.base import Observation, StepContext
from xfuser.model_executor.cache.adacorrection.offset import OffsetRow
from xfuser.model_executor.cache.adacorrection.published.bound import BoundCorrector
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.blocks.plan import cut
from xfuser.model_executor.cache.policies import POLICIES
from xfuser.model_executor.cache.steps import Call
from xfuser.model_executor.pipelines import MODEL_TYPES

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
TEMPLATE = ("What it is.", "Quick start.", "Parameters.", "Good for.", "Not good for.", "Trouble.")
NAMES = {
    "tiny-dit": "tiny-dit",
    "DiT": "dit",
    "FLUX": "flux",
    "PixArt α, Σ": "pixart",
    "Stable Diffusion 3": "sd3",
}
STEPS = 14


def test_every_method_and_mode_has_a_section_of_the_same_form() -> None:
    assert list(SECTIONS) == [*METHODS, "budget", "bound", "gate", "blend"]
    assert set(SECTIONS) == {name for name in POLICIES if name} | set(MODES)
    for name, text in SECTIONS.items():
        assert [part for part in TEMPLATE if f"**{part}**" in text] == list(TEMPLATE), name


def test_the_thresholds_are_those_in_force() -> None:
    for title, model_type in NAMES.items():
        (cells,) = re.findall(rf"^\| {re.escape(title)} \| (.*) \|$", PAGE, re.MULTILINE)
        numbers = dict(zip(("Fast", "Tea", "Fb"), map(float, cells.split(" | ")), strict=True))
        assert numbers == MODEL_TYPES[model_type].thresholds


@pytest.mark.parametrize("name", SECTIONS)
def test_the_quick_starts_name_settings_that_go_together(name: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL)
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    settings: dict[str, Any] = {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg}
    config = CacheConfig(**settings)
    assert name in (config.use_cache, config.mode)


@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_where_fast_never_hits_a_calibration_helps_and_no_threshold_does(toy: Toy) -> None:
    """These toys' changes grow during a generation, so that none is within what the first steps show as noise."""
    hit_rates = []
    for settings in ({"rel_l1_thresh": ALWAYS}, {"rel_l1_thresh": ALWAYS, "significance": 0.001}):
        with attached(toy.pipeline, "pipeline", "Fast", **settings) as engine:
            toy.images(STEPS)
            hit_rates.append(engine.summary()["hit_rate"])
            (branch,) = engine._branches.values()
            layers = branch.policy_state.layers.values()
            # The change that is judged first is beyond the noise already, and the last one many times.
            assert all(layer.changes[-1] > 4 * layer.changes[0] for layer in layers)
    assert hit_rates == [0, 0]
    with attached(toy.pipeline, "pipeline", "Fast", calibration="first") as engine:
        toy.images(STEPS, seed=7)
        toy.images(STEPS)
        # The first generation was evaluated in full, and counts.
        assert engine.summary()["hit_rate"] > 0.15


@pytest.mark.parametrize(("offset", "factor"), [(1e-6, 0.5), (0.04, 1.0), (9.0, 2.0)])
def test_one_steps_drift_moves_bounds_prediction_by_no_more_than_a_half_to_twice(offset: float, factor: float) -> None:
    config = CacheConfig(enable_adacorrection=True, adacorr_mode="bound")
    predicted = []
    for score in (0.04, offset):
        corrector = BoundCorrector(config, Extrapolation(0))
        state = corrector.new_state(1)
        row = OffsetRow(1.0, 0.8, 4.0, 1.0, 25.0, 0.01, 0.0, 0.0)
        state.estimate.observe([Observation(0, row, 1.0, 0)])
        for step, each in ((11, 0.04), (12, score)):
            context = StepContext(
                Call(step, ("0",), False, None), (0.0,), cut(1, 0, True), ((step - 1,),), 0, each, 1, (step - 1,)
            )
            plan = corrector.plan(state, context)
        predicted.append(plan.predicted[0])
    assert math.isfinite(predicted[0]) and predicted[1] == pytest.approx(factor * predicted[0])
