"""Nothing of one generation leaks into the next: after any disturbance, images and plan are a fresh engine's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from toys import FAMILIES, LEVELS, Toy, attached, wrapped

from xfuser.model_executor.adapters.dit import build_small as build_toy_dit

STEPS = 7
CORRECTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "matched": {"enable_adacorrection": True},
    "budget": {"enable_adacorrection": True, "adacorr_budget": 0.6},
    "bound": {"enable_adacorrection": True, "adacorr_tolerance": 0.08},
    "blend": {"enable_adacorrection": True, "adacorr_mode": "blend", "adacorr_score": "relative"},
}
# Thresholds at which each method both computes and reuses in the middle of a toy's generation.
THRESHOLDS = {("dit", "Tea"): 0.3, ("dit", "Fb"): 0.3, ("flux", "Tea"): 0.5, ("flux", "Fb"): 0.6}


class Bomb:
    """Raises at one call once armed."""

    def __init__(self) -> None:
        self.fuse = -1

    def tick(self) -> None:
        self.fuse -= 1
        if self.fuse == 0:
            raise RuntimeError("bomb")

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return original(*args, **kwargs)

        return step


def disturbances(toy: Toy, level: str, scheduler: Bomb, transformer: Bomb) -> dict[str, Callable[[], Any]]:
    def failing(bomb: Bomb, call: int) -> None:
        bomb.fuse = call
        with pytest.raises(RuntimeError, match="bomb"):
            toy.images(STEPS)
        bomb.fuse = -1

    return {
        "the same generation": lambda: toy.images(STEPS),
        "another batch size": lambda: toy.images(STEPS, batch=2, seed=3),
        "fewer steps": lambda: toy.images(3),
        "more steps": lambda: toy.images(STEPS + 2, seed=1),
        "an error in the scheduler": lambda: failing(scheduler, 4),
        "an error in the transformer": lambda: failing(transformer, 3),
        "an error in the first step": lambda: failing(transformer, 1),
        # A transformer alone cannot tell the same noise at the same timestep from another branch.
        "a single step": lambda: toy.images(1, seed=0 if level == "pipeline" else 9),
        "single steps": lambda: [toy.images(1, seed=seed) for seed in (11, 12)],
    }


def check(toy: Toy, level: str, method: str, correction: str) -> None:
    settings = CORRECTIONS[correction] | {"rel_l1_thresh": THRESHOLDS[toy.family, method]}
    with attached(toy.pipeline, level, method, **settings) as engine:
        expected, reference = toy.images(STEPS), engine.summary()
    assert reference["hit_rate"] > 0 or correction == "blend"
    assert not np.array_equal(expected, toy.plain_images(STEPS))
    scheduler, transformer = Bomb(), Bomb()
    with ExitStack() as stack:
        stack.enter_context(wrapped(toy.scheduler, "step", scheduler.wrap))
        hook = toy.transformer.norm_out.register_forward_pre_hook(lambda *_: transformer.tick())
        stack.callback(hook.remove)
        engine = stack.enter_context(attached(toy.pipeline, level, method, **settings))
        for name, disturb in disturbances(toy, level, scheduler, transformer).items():
            disturb()
            before = engine.summary()["generations"]
            images, summary = toy.images(STEPS), engine.summary()
            assert summary["generations"] == before + 1, name
            assert summary["plan"] == reference["plan"], name
            assert summary["weights"] == reference["weights"], name
            assert np.array_equal(images, expected), name
        engine.reset()
        assert engine.summary()["calls"] == 0
        images, summary = toy.images(STEPS), engine.summary()
        assert np.array_equal(images, expected)
        assert {**summary, "generations": 1} == reference


@pytest.mark.parametrize(
    ("method", "correction"),
    [(method, name) for method in ("Tea", "Fb") for name in CORRECTIONS if (method, name) != ("Fb", "blend")],
)
@pytest.mark.parametrize("level", LEVELS)
def test_dit_after_every_disturbance(dit: Toy, level: str, method: str, correction: str) -> None:
    check(dit, level, method, correction)


@pytest.mark.parametrize(
    ("level", "method", "correction"),
    [
        ("pipeline", "Tea", "base"),
        ("transformer", "Fb", "base"),
        ("transformer", "Tea", "budget"),
        ("pipeline", "Fb", "bound"),
    ],
)
def test_flux_after_every_disturbance(flux: Toy, level: str, method: str, correction: str) -> None:
    check(flux, level, method, correction)


@pytest.mark.parametrize("family", FAMILIES)
def test_summary_in_the_middle_changes_nothing(toy: Toy) -> None:
    """Reading takes in what the last step measured; the next step must not miss it, nor count it twice."""
    settings = {"enable_adacorrection": True, "adacorr_tolerance": 0.08, "rel_l1_thresh": 0.3}
    with attached(toy.pipeline, "pipeline", "Tea", **settings) as engine:
        expected, reference = toy.images(STEPS), engine.summary()
    engines = []

    def reading(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            engines[0].summary()
            return original(*args, **kwargs)

        return step

    with wrapped(toy.scheduler, "step", reading), attached(toy.pipeline, "pipeline", "Tea", **settings) as engine:
        engines.append(engine)
        assert np.array_equal(toy.images(STEPS), expected)
        assert engine.summary() == reference


@pytest.mark.parametrize("level", LEVELS)
def test_two_pipelines_in_two_threads(level: str) -> None:
    toys = [Toy("dit", build_toy_dit(seed)) for seed in (0, 1)]
    settings = [{"use_cache": "Tea", "rel_l1_thresh": 0.3}, {"use_cache": "Fb", **CORRECTIONS["budget"]}]

    def work(index: int) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
        torch.set_num_threads(1)
        images, plans = [], []
        for seed in range(3):
            images.append(toys[index].images(STEPS, batch=1 + index, seed=seed))
            plans.append(engines[index].summary()["plan"])
        return images, plans

    with ExitStack() as stack:
        engines = [
            stack.enter_context(attached(toy.pipeline, level, **each)) for toy, each in zip(toys, settings, strict=True)
        ]
        expected = [work(index) for index in range(2)]
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(work, range(2)))
        assert all(engine.summary()["hit_rate"] > 0 for engine in engines)
    for (images, plans), (expected_images, expected_plans) in zip(results, expected, strict=True):
        assert plans == expected_plans
        np.testing.assert_allclose(images, expected_images, atol=1e-5)
