"""The gate: its weight by hand, what gamma and tolerance do to it, its tokens, and budgets that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from toys import ALL_FAMILIES, ALWAYS, FAMILIES, Toy, attached, blocks_of, counted

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import spec_of
from xfuser.model_executor.adapters.dit import build_small as build_toy_dit
from xfuser.model_executor.cache import CacheEngine
from xfuser.model_executor.cache.adacorrection.base import Observation, StepContext
from xfuser.model_executor.cache.adacorrection.offset import OffsetRow
from xfuser.model_executor.cache.adacorrection.published.gate import LONGEST_LAG, GateCorrector, GateState, LayerGate
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.blocks.history import Reference
from xfuser.model_executor.cache.blocks.plan import Plan, cut
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice
from xfuser.model_executor.cache.calibration.linear import LinearMaps
from xfuser.model_executor.cache.steps import Call
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit

GATE: dict[str, Any] = {"enable_adacorrection": True, "adacorr_mode": "gate"}


def corrector_of(order: int = 0, **settings: Any) -> GateCorrector:
    settings = {"adacorr_tolerance": 0.1, "adacorr_lambda": 0.0} | settings
    return GateCorrector(CacheConfig(**GATE, **settings), Extrapolation(order))


def context_at(step: int, *nodes: tuple[int, ...], proposal: float = 0.0) -> StepContext:
    measured = tuple(each[0] if each else None for each in nodes)
    blocks = len(nodes)
    return StepContext(
        Call(step, ("0",), False, None), (proposal,) * blocks, cut(blocks, 0, True), nodes, 0, measured=measured
    )


def seen(block: int, error: float, drift: float, lag: int, order: int = 0) -> Observation:
    """An evaluation whose stand-in was off by ``error`` and whose input had moved by ``drift``, both relative."""
    row = OffsetRow(1.0, drift * 4, 4.0, 1.0, 25.0, error**2 * 25, 0.0, 0.0)
    return Observation(block, row, 1.0, order, lag, 1.0, 16)


# -- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gamma", "lag", "predicted"),
    [(1.0, 1, 0.02), (1.0, 2, 0.08), (1.0, 3, 0.18), (0.5, 3, 0.09), (2.0, 2, 0.16), (0.25, 5, 0.125)],
)
def test_the_predicted_error(gamma: float, lag: int, predicted: float) -> None:
    """γ · sensitivity · rate · lag² = γ · 2 · 0.01 · lag², and w = predicted / 0.1 reaches 1 at the tolerance."""
    corrector = corrector_of(adacorr_gamma=gamma)
    state = corrector.new_state(1)
    state.layers[0] = LayerGate(rate=0.01, sensitivity=2.0)
    plan = corrector.plan(state, context_at(10 + lag, (10,)))
    assert plan.predicted == pytest.approx((predicted,))
    assert plan.evaluate == (predicted >= 0.1,)


def test_a_proposal_halves_what_is_tolerated() -> None:
    corrector = corrector_of()
    for proposal, evaluates in ((0.0, False), (0.5, True), (1.0, True)):
        state = GateState(corrector.new_state(1).estimate, {0: LayerGate(0.01, 2.0)})
        # 0.08 against 0.1, 0.075 and 0.05.
        assert corrector.plan(state, context_at(12, (10,), proposal=proposal)).evaluate == (evaluates,)


def test_what_a_layer_learns() -> None:
    """S = D². First D = 0.2 over 2 steps with an error of 0.06, then D = 0.1 over 1 step with 0.01; means of both."""
    corrector = corrector_of()
    state = corrector.new_state(1)
    corrector.learn(state, [seen(0, error=0.06, drift=0.2, lag=2)])
    assert (state.layers[0].rate, state.layers[0].sensitivity) == pytest.approx((0.01, 1.5))
    corrector.learn(state, [seen(0, error=0.01, drift=0.1, lag=1)])
    assert (state.layers[0].rate, state.layers[0].sensitivity) == pytest.approx((0.01, (1.5 + 1.0) / 2))


@pytest.mark.parametrize("score", ["relative", "absolute"])
@pytest.mark.parametrize("adacorr_lambda", [0.0, 1.0])
def test_one_observation_is_taken_at_its_word(score: str, adacorr_lambda: float) -> None:
    """Whatever the score is: at the lag at which an error was seen, it is what is predicted."""
    corrector = corrector_of(adacorr_score=score, adacorr_lambda=adacorr_lambda)
    state = corrector.new_state(1)
    corrector.learn(state, [seen(0, error=0.03, drift=0.2, lag=3)])
    assert corrector.plan(state, context_at(9, (6,))).predicted == pytest.approx((0.03,))
    assert corrector.plan(state, context_at(7, (6,))).predicted == pytest.approx((0.03 / 9,))


def test_a_layer_that_has_shown_nothing_is_evaluated() -> None:
    corrector = corrector_of(adacorr_tolerance=1e6)
    state = corrector.new_state(2)
    corrector.learn(state, [seen(0, error=0.03, drift=0.2, lag=1)])
    plan = corrector.plan(state, context_at(2, (1,), (1,)))
    assert plan.evaluate == (False, True)
    assert math.isnan(plan.predicted[1])
    # Nor does one whose history is too short for the extrapolation, or that has waited too long.
    assert corrector.plan(state, context_at(2 + LONGEST_LAG, (1,), (1,))).evaluate[0]
    taylor = corrector_of(1, adacorr_tolerance=1e6)
    assert taylor.plan(GateState(state.estimate, state.layers), context_at(2, (1,))).evaluate == (True,)
    assert taylor.plan(GateState(state.estimate, state.layers), context_at(2, (1, 0))).evaluate == (False,)


def test_unusual_drift_is_taken_into_account() -> None:
    """Twice the usual score: twice the error. What is usual moves on by a fifth."""
    corrector = corrector_of()
    state = corrector.new_state(1)
    state.layers[0] = LayerGate(0.01, 2.0)

    def predicted(offset: float) -> float:
        context = replace(context_at(11, (10,)), offset=offset, offset_lag=1)
        return corrector.plan(state, context).predicted[0]

    assert predicted(0.04) == pytest.approx(0.02)
    assert predicted(0.08) == pytest.approx(0.04)
    assert predicted(0.06) == pytest.approx(0.02 * 0.06 / (0.8 * 0.04 + 0.2 * 0.08))
    assert predicted(math.nan) == pytest.approx(0.02)


@pytest.mark.parametrize(("offset", "factor"), [(0.0008, 0.5), (0.01, 0.5), (0.9, 2.0)])
def test_one_steps_drift_moves_a_prediction_by_no_more_than_a_half_to_twice(offset: float, factor: float) -> None:
    """A relative score is small for one step where the spatial variation turns round. When that alone could bring a
    prediction to nothing, the second real step of a generation was skipped: more so with a larger γ, which had
    evaluated the first one, so that a larger γ drew worse.
    """
    corrector = corrector_of()
    state = corrector.new_state(1)
    state.layers[0] = LayerGate(0.01, 2.0)
    predicted = []
    for step, each in ((11, 0.04), (12, offset)):
        context = replace(context_at(step, (step - 1,)), offset=each, offset_lag=1)
        predicted.append(corrector.plan(state, context).predicted[0])
    assert predicted == pytest.approx([0.02, 0.02 * factor])


@pytest.mark.parametrize(
    ("score", "evaluates"), [(0.04, False), (0.0499, False), (0.0501, True), (math.nan, True), (0.0, False)]
)
def test_by_layers_the_current_score_decides(score: float, evaluates: bool) -> None:
    """Sensitivity 2, tolerance 0.1: w reaches 1 at S = 0.05."""
    corrector = corrector_of()
    state = corrector.new_state(1)
    state.layers[0] = LayerGate(123.0, 2.0)
    assert corrector.evaluates(state, 0, score, (3,), 0.0) is evaluates
    assert corrector.evaluates(state, 0, 0.03, (3,), 1.0) is True
    assert corrector.evaluates(state, 1, 0.03, (3,), 0.0) is True


def test_a_tolerance_of_0_evaluates_whatever_was_seen() -> None:
    corrector = corrector_of(adacorr_tolerance=0)
    state = corrector.new_state(1)
    corrector.learn(state, [seen(0, error=0.0, drift=0.0, lag=1)])
    assert corrector.plan(state, context_at(2, (1,))).evaluate == (True,)
    assert corrector.evaluates(state, 0, 0.0, (1,), 0.0) is True


# -- on models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"sync": "layer"}, {"granularity": "token"}], ids=str)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_tolerance_of_0_changes_no_bit(toy: Toy, settings: dict[str, Any]) -> None:
    expected = toy.plain_images(6, batch=2)
    settings = GATE | {"rel_l1_thresh": ALWAYS, "adacorr_tolerance": 0} | settings
    method = "Fb" if settings.get("sync") == "layer" else "Fast"
    with attached(toy.pipeline, "pipeline", method, **settings) as engine:
        assert np.array_equal(toy.images(6, batch=2), expected)
        assert engine.summary()["hit_rate"] == 0


@pytest.fixture(scope="module")
def tiny() -> Toy:
    pipeline = DiTPipeline.from_pretrained(shipped_tiny_dit()).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return Toy("dit", pipeline)


def evaluated(toy: Toy, steps: int, method: str | None = None, **settings: Any) -> float:
    with attached(toy.pipeline, "pipeline", method, **settings) as engine:
        toy.images(steps)
        return 1 - engine.summary()["hit_rate"]


GAMMAS = (0.25, 0.5, 1.0, 2.0, 4.0)
TOLERANCES = (0.005, 0.02, 0.05, 0.2)


@pytest.mark.parametrize("sync", ["step", "layer"])
@pytest.mark.parametrize("model", ["tiny", "flux"])
def test_gamma_raises_and_tolerance_lowers_what_is_evaluated(
    model: str, sync: str, request: pytest.FixtureRequest
) -> None:
    toy, steps = request.getfixturevalue(model), 14
    tolerance = 0.05 if model == "tiny" else 0.01
    by_gamma = [
        evaluated(
            toy, steps, **GATE, sync=sync, adacorr_tolerance=tolerance, adacorr_gamma=gamma, approximation="residual"
        )
        for gamma in GAMMAS
    ]
    assert all(low <= high for low, high in pairwise(by_gamma)) and by_gamma[0] < by_gamma[-1]
    by_tolerance = [
        evaluated(toy, steps, **GATE, sync=sync, adacorr_tolerance=tolerance, approximation="residual")
        for tolerance in TOLERANCES
    ]
    assert all(low >= high for low, high in pairwise(by_tolerance)) and by_tolerance[0] > by_tolerance[-1]


@pytest.mark.parametrize("method", [None, "Tea", "Fb", "Fast", "Interval"])
@pytest.mark.parametrize("sync", ["step", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_base_can_be_gated(toy: Toy, method: str | None, sync: str) -> None:
    settings = GATE | {"sync": sync, "adacorr_tolerance": 0.3}
    if method in ("Tea", "Fb", "Fast"):
        settings["rel_l1_thresh"] = 0.1
    with counted(toy) as counts, attached(toy.pipeline, "pipeline", method, **settings) as engine:
        images = toy.images(12)
        summary = engine.summary()
    assert summary["hit_rate"] == pytest.approx(1 - sum(counts) / (12 * len(counts)))
    # With nothing to propose, None asks for everything: what is tolerated is always halved.
    assert 0.1 < summary["hit_rate"] < 0.9
    assert np.isfinite(images).all()
    assert np.abs(images - toy.plain_images(12)).mean() < 0.2


@pytest.mark.parametrize("sync", ["step", "layer"])
def test_a_weight_is_noted_where_something_stood_in(dit: Toy, sync: str) -> None:
    with attached(dit.pipeline, "pipeline", None, **GATE, sync=sync, adacorr_tolerance=0.1) as engine:
        dit.images(12)
        summary = engine.summary()
    (plan,), (weights,) = summary["plan"].values(), summary["weights"].values()
    assert 0 < summary["hit_rate"] < 1
    assert [[weight is not None for weight in row] for row in weights] == [
        [share == 0 for share in row] for row in plan
    ]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_tokens_of_a_block_can_be_evaluated(toy: Toy) -> None:
    steps, tolerance = 14, {"dit": 0.05, "flux": 0.006, "pixart": 0.02, "sd3": 0.02}[toy.family]
    settings = GATE | {"granularity": "token", "adacorr_tolerance": tolerance, "approximation": "residual"}
    names = spec_of(toy.transformer).groups[0].self_attention
    counts, most = 0, 0

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal counts, most
        text = kwargs.get("encoder_hidden_states")
        tokens = (args[0] if args else kwargs["hidden_states"]).shape[1] + (0 if text is None else text.shape[1])
        counts, most = counts + tokens, max(most, tokens)

    with ExitStack() as stack:
        for block in toy.blocks:
            stack.callback(getattr(block, names[0]).register_forward_pre_hook(count, with_kwargs=True).remove)
        engine = stack.enter_context(attached(toy.pipeline, "pipeline", "Interval", interval=50, **settings))
        images = toy.images(steps, batch=2)
        summary = engine.summary()
    (plan,) = summary["plan"].values()
    assert any(0 < share < 1 for row in plan for share in row)
    assert summary["hit_rate"] == pytest.approx(1 - counts / (most * len(toy.blocks) * steps), abs=1e-9)
    assert 0 < summary["hit_rate"] < 1
    assert np.abs(images - toy.plain_images(steps, batch=2)).mean() < 0.2


@contextmanager
def dictated(engine: CacheEngine, plan: Callable[[int], tuple[bool, ...]]) -> Iterator[None]:
    """Dictate the corrector's plan, by the step."""
    original = engine.planner.corrector.plan

    def planned(state: Any, context: StepContext) -> Plan:
        made = original(state, context)
        return Plan.of(context.spans, plan(context.call.step), made.segments[0].correction, made.predicted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.planner.corrector, "plan", planned)
        yield


def test_tokens_of_one_block_are_not_those_of_the_next(dit: Toy) -> None:
    """Block 0 is approximated and four of its tokens ask; block 1 is to be evaluated, which means all of it."""
    with attached(dit.pipeline, "pipeline", None, **GATE, granularity="token") as engine:
        asked: list[int] = []

        def asking(state: Any, block: int, share: float, inputs: Any, seen: Any) -> TokenChoice | None:
            asked.append(block)
            return TokenChoice(torch.arange(4).expand(len(inputs[0]), -1), 16) if block == 0 else None

        engine.planner.corrector.choose_tokens = asking  # type: ignore[method-assign]
        with dictated(engine, lambda step: (step < 4, True, step < 4, True)):
            dit.images(6)
        (plan,) = engine.summary()["plan"].values()
    assert asked == [0, 2] * 2
    assert plan == [[1, 1, 1, 1]] * 4 + [[0.25, 1, 0, 1]] * 2


@pytest.mark.parametrize("another_asks", [False, True])
def test_a_token_that_creeps_is_evaluated_in_time(another_asks: bool) -> None:
    """Token 5 moves by a little at every step, always the same way. A token's own drift is what it has moved since *it*
    was evaluated last, so it comes to ask for evaluation, also where another token asks at every step before that.
    """
    pipeline = build_toy_dit()
    base, direction = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    creeping = torch.zeros(1, 1, 4, 4)
    creeping[..., 1, 1] = 1
    settings = GATE | {"granularity": "token", "adacorr_tolerance": 0.05, "approximation": "residual"}
    asked: list[bool] = []
    with attached(pipeline, "transformer", None, **settings) as engine:
        original = engine.planner.corrector.choose_tokens

        def asking(state: Any, block: int, share: float, inputs: Any, seen: Any) -> TokenChoice | None:
            choice = original(state, block, share, inputs, seen)
            if block == 0:
                asked.append(choice is not None and 5 in choice.places[0].tolist())
            return TokenChoice(torch.tensor([[0]]), 16) if choice is None and another_asks else choice

        engine.planner.corrector.choose_tokens = asking  # type: ignore[method-assign]
        # A drift of a tenth asks; the token moves by less than half of that in a step.
        engine.planner.corrector.token_sensitivity = lambda state, unit, proposal: 1 / 0.1**2  # type: ignore[method-assign]
        with dictated(engine, lambda step: (step < 4,) * 4), torch.no_grad():
            for step in range(16):
                sample = base + 0.12 * step * direction * creeping
                pipeline.transformer(sample, timestep=torch.tensor([900 - step]), class_labels=torch.tensor([3]))
    assert not asked[0]
    assert any(asked)


@pytest.mark.parametrize("approximation", ["residual"])
def test_the_true_error_is_that_of_what_would_have_stood_in(dit: Toy, approximation: str) -> None:
    """So few tokens are all sampled, which makes it exact. Everything is evaluated, so the last step is the newest."""
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in dit.blocks]

    def noting(index: int) -> Callable[..., None]:
        return lambda module, args, output: seen[index].append((args[0], output))

    settings = GATE | {"adacorr_tolerance": 0, "approximation": approximation}
    with ExitStack() as stack:
        for index, block in enumerate(dit.blocks):
            stack.callback(block.register_forward_hook(noting(index)).remove)
        engine = stack.enter_context(attached(dit.pipeline, "pipeline", None, **settings))
        dit.images(5)
        (true,) = engine.summary()["true_errors"].values()
    for block, steps in enumerate(seen):
        maps = LinearMaps()
        references = [Reference(step, (before,), (after,)) for step, (before, after) in enumerate(steps)]
        for step in range(1, 5):
            inputs, outputs = steps[step]
            if approximation == "linear":
                (standing,) = maps.predict(block, (inputs,), references[step - 1])
                maps.learn(block, references[step - 1], references[step])
            else:
                standing = inputs + steps[step - 1][1] - steps[step - 1][0]
            error = float(torch.linalg.vector_norm(outputs - standing) / torch.linalg.vector_norm(outputs))
            assert true[step][block] == pytest.approx(error, rel=1e-3)


# -- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("Fast", {"rel_l1_thresh": 0.05}),
        ("Fast", {"rel_l1_thresh": ALWAYS}),
        ("Fast", {"rel_l1_thresh": 0.05, "motion_threshold": 0.3}),
        ("Interval", {"interval": 2}),
        ("Tea", {"rel_l1_thresh": 0.1}),
        (None, {}),
    ],
    ids=str,
)
def test_budgets_are_kept(tiny: Toy, method: str | None, settings: dict[str, Any], asked: float) -> None:
    """A budget is a number of whole steps, counted by the blocks that ran: within a point of what was asked."""
    steps = 50
    small = Toy("dit", build_toy_dit())
    with counted(small) as counts:
        settings = settings | {"enable_adacorrection": True, "adacorr_budget": asked}
        share = evaluated(small, steps, method, **settings)
    assert share == pytest.approx(sum(counts) / (steps * len(counts)))
    assert share == pytest.approx(asked, abs=0.01)


@pytest.mark.parametrize("motion_threshold", [None, 0.3])
def test_a_budget_with_fast_on_a_trained_model(tiny: Toy, motion_threshold: float | None) -> None:
    settings = {"rel_l1_thresh": 0.015, "motion_threshold": motion_threshold, "enable_adacorrection": True}
    assert evaluated(tiny, 50, "Fast", **settings, adacorr_budget=0.4) == pytest.approx(0.4, abs=0.01)
    assert len(blocks_of(tiny.transformer)) == 12
    assert evaluated(tiny, 10, "Fast", **settings, adacorr_budget=1.0) == 1
