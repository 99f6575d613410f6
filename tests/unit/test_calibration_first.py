"""The first generation of a job as its calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import FITTED, STEPS, noise_of, polynomial_of, recorded
from toys import ALWAYS, FAMILIES, ScriptedTransformer, Toy, attached, drive, scripted_engine, wrapped

from xfuser.model_executor.cache import CacheEngine

# -- the first generation as the calibration -----------------------------------------------------------------------

FIRST: tuple[tuple[str | None, dict[str, Any]], ...] = (
    ("Fast", {"rel_l1_thresh": ALWAYS, "significance": 0}),
    ("Fast", {"rel_l1_thresh": ALWAYS, "motion_threshold": 0.3, "sync": "layer"}),
    ("Tea", {"rel_l1_thresh": 0.5}),
    ("Tea", FITTED),
    ("Fb", {"rel_l1_thresh": ALWAYS, "approximation": "fitted"}),
    ("Interval", {"approximation": "fitted"}),
    ("Fast", {"enable_adacorrection": True, "adacorr_budget": 0.5}),
    ("Fb", {"enable_adacorrection": True, "adacorr_tolerance": 0.3}),
    (None, {"enable_adacorrection": True, "adacorr_mode": "gate", "adacorr_tolerance": 0.3}),
    (None, {"enable_adacorrection": True, "adacorr_mode": "gate", "adacorr_tolerance": 0.3, "granularity": "token"}),
)


@pytest.mark.parametrize(("method", "settings"), FIRST, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_generation_is_whole_and_the_next_ones_hit(
    toy: Toy, method: str | None, settings: dict[str, Any]
) -> None:
    steps = 12
    expected = toy.plain_images(steps)
    with attached(toy.pipeline, "pipeline", method, calibration="first", **settings) as engine:
        assert np.array_equal(toy.images(steps), expected)
        summary = engine.summary()
        assert (summary["hit_rate"], summary["calibrated"]) == (0, False)
        images = toy.images(steps)
        summary = engine.summary()
        assert summary["calibrated"] is True
        assert 0.1 < summary["hit_rate"] * 2 < 1
        assert 0 < np.abs(images - expected).mean() < 0.2
        # What was learned is learned once.
        assert np.array_equal(toy.images(steps), images)


def test_a_model_without_weights_is_learned_from_too() -> None:
    transformer = ScriptedTransformer(lambda step: 1.0 + step, lambda step: 10.0)
    engine = scripted_engine(
        transformer, use_cache="Interval", interval=2, approximation="fitted", num_steps=6, calibration="first"
    )
    for hits in (False, True):
        transformer.run([1.0] * 6)
        assert any(sum(row) == 0 for row in engine.summary()["plan"]["0"]) is hits
    engine.remove()


def test_blending_waits_for_the_first_generation(dit: Toy) -> None:
    """ "first" is evaluated in full, and nothing else: what is learned is the model, not a blend."""
    expected = dit.plain_images(STEPS)
    settings = {"enable_adacorrection": True, "adacorr_mode": "blend", "approximation": "fitted"}
    settings["adacorr_score"] = "relative"
    with attached(dit.pipeline, "pipeline", None, calibration="first", **settings):
        assert np.array_equal(dit.images(STEPS), expected)


def test_first_learns_what_calibrate_would(dit: Toy) -> None:
    expected = recorded(dit)
    with attached(dit.pipeline, "pipeline", "Fast", calibration="first") as engine:
        dit.images(STEPS)
        dit.images(STEPS)
        learned = engine.planner.calibration
    assert torch.equal(learned.gram, expected.gram)
    assert (noise_of(learned), polynomial_of(learned)) == (noise_of(expected), polynomial_of(expected))
    assert learned.provenance == expected.provenance


@pytest.mark.parametrize("other", [6, 12])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("Fast", {"rel_l1_thresh": ALWAYS, "significance": 0}),
        ("Tea", FITTED),
        ("Fb", {"enable_adacorrection": True, "adacorr_tolerance": 0.3}),
        ("Tea", {"enable_adacorrection": True, "adacorr_budget": 0.6}),
        ("Fast", {"enable_adacorrection": True, "adacorr_mode": "gate", "adacorr_tolerance": 0.3}),
    ],
    ids=str,
)
def test_another_number_of_steps_is_learned_anew(dit: Toy, method: str, settings: dict[str, Any], other: int) -> None:
    expected = dit.plain_images(other)
    with attached(dit.pipeline, "pipeline", method, calibration="first", **settings) as engine:
        dit.images(9)
        dit.images(9)
        assert engine.summary()["hit_rate"] > 0
        assert np.array_equal(dit.images(other), expected)
        assert not hits(engine)
        assert not np.array_equal(dit.images(other), expected)
        assert hits(engine)
        assert engine.planner.calibration.steps == other


def hits(engine: CacheEngine) -> bool:
    """Whether anything was left out in the last generation."""
    return any(share < 1 for rows in engine.summary()["plan"].values() for row in rows for share in row)


def test_a_reset_keeps_what_the_first_generation_taught(dit: Toy) -> None:
    """It forgets activations and statistics. The generation was over."""
    with attached(
        dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, significance=0, calibration="first"
    ) as engine:
        dit.images(STEPS)
        engine.reset()
        dit.images(STEPS)
        assert hits(engine)


class Interrupted(Exception):
    pass


def interrupt(toy: Toy, steps: int, after: int) -> None:
    """A generation that the user ends after some steps."""
    done = []

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(done) == after:
                raise Interrupted
            done.append(None)
            return original(*args, **kwargs)

        return forward

    with pytest.raises(Interrupted), wrapped(toy.pipeline.scheduler, "scale_model_input", wrap):
        toy.images(steps)


def fail(toy: Toy, steps: int, after: int) -> None:
    """A generation in which the third block fails."""
    done = []

    def note(module: Any, args: Any) -> None:
        done.append(None)
        if len(done) > after:
            raise Interrupted

    hook = toy.blocks[2].register_forward_pre_hook(note)
    try:
        with pytest.raises(Interrupted):
            toy.images(steps)
    finally:
        hook.remove()


@pytest.mark.parametrize("ending", [interrupt, fail])
@pytest.mark.parametrize("after", [1, STEPS - 1])
def test_an_interrupted_generation_teaches_nothing(
    dit: Toy, ending: Callable[[Toy, int, int], None], after: int
) -> None:
    expected = recorded(dit, seeds=(4,))
    with attached(dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, calibration="first") as engine:
        ending(dit, STEPS, after)
        assert np.array_equal(dit.images(STEPS, seed=4), plain_images(4))
        dit.images(STEPS)
        assert torch.equal(engine.planner.calibration.gram, expected.gram)
        assert engine.summary()["hit_rate"] > 0


def plain_images(seed: int) -> np.ndarray:
    """From a pipeline of the same weights, since this one has a cache attached."""
    return Toy.build("dit").images(STEPS, seed=seed)


def test_an_interruption_while_learning_anew_is_forgotten(dit: Toy) -> None:
    """A job goes back to the number of steps that it knows: it hits again."""
    with attached(
        dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, significance=0, calibration="first"
    ) as engine:
        dit.images(STEPS)
        expected = dit.images(STEPS)
        interrupt(dit, 12, 5)
        for _ in range(2):
            assert np.array_equal(dit.images(STEPS), expected)
            assert hits(engine)


def test_a_reset_in_the_middle_forgets_the_generation_but_not_the_job(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", None) as engine:
        engine.record()
        dit.images(STEPS)
        first = engine.recorded()
        interrupt(dit, STEPS, 4)
        engine.reset()
        assert torch.equal(engine.recorded().gram, first.gram)


def test_first_learns_where_the_number_of_steps_is_told(dit: Toy) -> None:
    with attached(
        dit.pipeline, "transformer", "Fast", calibration="first", rel_l1_thresh=ALWAYS, num_steps=9
    ) as engine:
        drive(dit.transformer, 9)
        drive(dit.transformer, 9, seed=1)
        assert engine.summary()["hit_rate"] > 0


def test_nothing_recorded_is_an_error(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", None) as engine:
        with pytest.raises(ValueError, match="record"):
            engine.recorded()
        engine.record()
        with pytest.raises(ValueError, match="generat"):
            engine.recorded()
