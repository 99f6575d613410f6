"""Something remembered turns into NaN or infinity: it is caught before it is used, and caching goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toys import ALWAYS, FAMILIES, Toy, attached, wrapped

from xfuser.model_executor.cache import CacheEngine
from xfuser.model_executor.cache.blocks.history import Reference

STEPS = 9
PLANT_AFTER = 3


def last_outputs(reference: Reference) -> torch.Tensor:
    return reference.outputs[0]


def last_residual(reference: Reference) -> torch.Tensor:
    return next(iter(reference.residuals.values()))[-1]


def inputs_of(reference: Reference) -> torch.Tensor:
    return reference.inputs[-1]


class Saboteur:
    """Spoils one number of what the engine remembers, once, after a given step."""

    def __init__(self, value: float, target: Callable[[Reference], torch.Tensor]) -> None:
        self.value, self.target = value, target
        self.engine: CacheEngine | None = None
        self.steps = 0

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if self.steps == PLANT_AFTER:
                self.plant()
            self.steps += 1
            return original(*args, **kwargs)

        return step

    def plant(self) -> None:
        assert self.engine is not None
        (branch,) = self.engine._branches.values()
        histories = [history for history in branch.memory.references if history]
        tensor = self.target(histories[-1][0])
        tensor[0, -1, 1] = self.value


def sabotaged(
    toy: Toy, level: str, method: str, value: float, target: Callable[[Reference], torch.Tensor], **settings: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    saboteur = Saboteur(value, target)
    with wrapped(toy.scheduler, "step", saboteur.wrap), attached(toy.pipeline, level, method, **settings) as engine:
        saboteur.engine = engine
        images = toy.images(STEPS)
        return images, engine.summary()


def computed(summary: dict[str, Any]) -> list[int]:
    (plan,) = summary["plan"].values()
    return [step for step, row in enumerate(plan) if all(row)]


@pytest.mark.parametrize("target", [last_outputs, last_residual, inputs_of])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["Tea", "Fb"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_caught_and_hits_go_on(
    toy: Toy, method: str, value: float, target: Callable[[Reference], torch.Tensor]
) -> None:
    """The next step computes, and what it computes serves the steps after it."""
    images, summary = sabotaged(toy, "pipeline", method, value, target, rel_l1_thresh=ALWAYS)
    last = [STEPS - 1] if method == "Tea" else []
    assert computed(summary) == [0, PLANT_AFTER + 1, *last]
    assert np.isfinite(images).all()
    assert summary["non_finite"] == 1
    assert np.abs(images - toy.plain_images(STEPS)).max() < 1


@pytest.mark.parametrize("level", ["transformer", "pipeline"])
@pytest.mark.parametrize(
    "settings",
    [
        {"enable_adacorrection": True},
        {"enable_adacorrection": True, "adacorr_budget": 0.5},
        {"enable_adacorrection": True, "adacorr_tolerance": 0.5},
        {"enable_adacorrection": True, "adacorr_mode": "blend", "adacorr_gamma": 0.5},
        {"approximation": "taylor-2"},
    ],
    ids=["matched", "budget", "bound", "blend", "taylor-2"],
)
@pytest.mark.parametrize("method", ["Tea", "Fb"])
def test_under_every_correction(dit: Toy, level: str, method: str, settings: dict[str, Any]) -> None:
    images, summary = sabotaged(dit, level, method, math.nan, last_outputs, rel_l1_thresh=ALWAYS, **settings)
    (plan,) = summary["plan"].values()
    assert np.isfinite(images).all()
    assert summary["non_finite"] >= 1
    assert all(plan[PLANT_AFTER + 1])
    if settings.get("adacorr_mode") != "blend":
        assert not all(all(row) for row in plan[PLANT_AFTER + 2 :])


class PairSaboteur(Saboteur):
    """Spoils the older of the evaluations that a linear map is still to be fitted from."""

    def plant(self) -> None:
        assert self.engine is not None
        (branch,) = self.engine._branches.values()
        assert branch.maps is not None
        older, *_ = branch.maps.pairs[max(branch.maps.pairs)][0]
        older[0, -1, 1] = self.value


def test_before_a_map_is_fitted_from_it(dit: Toy) -> None:
    saboteur = PairSaboteur(math.nan, last_outputs)
    saboteur.steps = 1  # the last step of Fast's warm-up
    with wrapped(dit.scheduler, "step", saboteur.wrap):
        with attached(dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, significance=0) as engine:
            saboteur.engine = engine
            images, summary = dit.images(STEPS), engine.summary()
    assert np.isfinite(images).all()
    assert summary["non_finite"] == 1
    assert computed(summary) == [0, 1, 2, 3]


def test_nothing_is_counted_where_nothing_happened(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", "Tea", rel_l1_thresh=ALWAYS) as engine:
        dit.images(STEPS)
        assert engine.summary()["non_finite"] == 0


def test_the_next_generation_is_clean(dit: Toy) -> None:
    saboteur = Saboteur(math.nan, last_outputs)
    with attached(dit.pipeline, "pipeline", "Tea", rel_l1_thresh=ALWAYS):
        expected = dit.images(STEPS)
    with wrapped(dit.scheduler, "step", saboteur.wrap):
        with attached(dit.pipeline, "pipeline", "Tea", rel_l1_thresh=ALWAYS) as engine:
            saboteur.engine = engine
            assert not np.array_equal(dit.images(STEPS), expected)
            assert np.array_equal(dit.images(STEPS), expected)
            assert engine.summary()["non_finite"] == 1
