"""What stands in for a block: weights, remainders, runs of blocks, and exactness where it can be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from toys import FAMILIES, ScriptedTransformer, Toy, attached, drive, growing_values, scripted_engine, wrapped

from xfuser.model_executor.cache.approximation import ORDERS, Extrapolation, extrapolation_weights, remainder
from xfuser.model_executor.cache.blocks.history import BlockHistory
from xfuser.model_executor.cache.blocks.plan import Span


@pytest.mark.parametrize(
    ("step", "nodes", "order", "expected"),
    [
        (6, (5, 3, 0), 0, (1.0,)),
        # (6 - 3) / (5 - 3) and (6 - 5) / (3 - 5)
        (6, (5, 3), 1, (1.5, -0.5)),
        (4, (3, 2), 1, (2.0, -1.0)),
        # 4·7 / (2·5), 2·7 / (-2·3), 2·4 / (-5·-3)
        (7, (5, 3, 0), 2, (2.8, -7 / 3, 8 / 15)),
        # Older nodes than the order needs are left alone; fewer lower it.
        (6, (5, 3, 0), 1, (1.5, -0.5)),
        (6, (5,), 2, (1.0,)),
        (6, (5, 3), 2, (1.5, -0.5)),
        # At a node, it is that node.
        (5, (5, 3, 0), 2, (1.0, 0.0, 0.0)),
    ],
)
def test_weights_by_hand(step: int, nodes: tuple[int, ...], order: int, expected: tuple[float, ...]) -> None:
    assert extrapolation_weights(step, nodes, order) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_weights_are_exact_on_polynomials_of_their_order(order: int) -> None:
    rng = np.random.default_rng(order)
    for _ in range(20):
        nodes = tuple(sorted(rng.choice(30, size=order + 1, replace=False).tolist(), reverse=True))
        step = nodes[0] + int(rng.integers(1, 6))
        weights = extrapolation_weights(step, nodes, order)
        coefficients = rng.normal(size=order + 1)
        extrapolated = sum(w * np.polyval(coefficients, node) for w, node in zip(weights, nodes, strict=True))
        assert sum(weights) == pytest.approx(1, abs=1e-9)
        assert extrapolated == pytest.approx(np.polyval(coefficients, step), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("correction", [0.0, 0.3, 1.0])
def test_correction_scales_the_highest_term(correction: float, order: int) -> None:
    """Between the polynomial of the order below and the full one; of a secant, between plain reuse and the secant."""
    nodes, step = (9, 6, 5)[: order + 1], 11
    lower = np.array([*extrapolation_weights(step, nodes[:-1], order - 1), 0.0])
    full = np.array(extrapolation_weights(step, nodes, order))
    weights = extrapolation_weights(step, nodes, order, correction)
    assert weights == pytest.approx(tuple(lower + correction * (full - lower)), abs=1e-12)
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize(
    ("nodes", "order", "expected"),
    [
        # (11 - 6) / (9 - 6) = 5/3 for the secant; half of its excess over plain reuse is 1/3.
        ((9, 6), 1, (4 / 3, -1 / 3)),
        # Nothing to correct: plain reuse, or a history too short for the order.
        ((9, 6), 0, (1.0,)),
        ((9, 6), 2, (5 / 3, -2 / 3)),
        ((9,), 1, (1.0,)),
    ],
)
def test_half_a_correction_by_hand(nodes: tuple[int, ...], order: int, expected: tuple[float, ...]) -> None:
    assert extrapolation_weights(11, nodes, order, 0.5) == pytest.approx(expected)


def test_no_correction_of_a_secant_is_plain_reuse() -> None:
    assert extrapolation_weights(11, (9, 6), 1, 0.0) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("step", "nodes", "order", "expected"),
    [
        (7, (5, 3, 0), 0, 2.0),
        (7, (5, 3, 0), 1, 2 * 4 / 2),
        (7, (5, 3, 0), 2, 2 * 4 * 7 / 6),
        (5, (5, 3, 0), 2, 0.0),
        (4, (5, 3), 1, 0.5),
    ],
)
def test_remainder_by_hand(step: int, nodes: tuple[int, ...], order: int, expected: float) -> None:
    assert remainder(step, nodes, order) == pytest.approx(expected)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_remainder_is_the_error_on_the_next_power(order: int) -> None:
    """For u^(p+1) the (p+1)-th derivative is (p+1)!, so the interpolation error is remainder · (p+1)!."""
    nodes, step = (8, 5, 1)[: order + 1], 10
    weights = extrapolation_weights(step, nodes, order)
    error = step ** (order + 1) - sum(w * node ** (order + 1) for w, node in zip(weights, nodes, strict=True))
    assert abs(error) == pytest.approx(remainder(step, nodes, order) * [1, 2, 6][order], rel=1e-9)


def test_history_lengths() -> None:
    lengths = {
        name: Extrapolation(ORDERS[name]).order + 1 for name in ("activation", "residual", "taylor-1", "taylor-2")
    }
    assert lengths == {"activation": 1, "residual": 1, "taylor-1": 2, "taylor-2": 3}


def filled_memory(linked: bool) -> tuple[BlockHistory, list[list[torch.Tensor]]]:
    """Three units of two streams, evaluated at steps 0 and 2, and what was stored: the states before and after each."""
    generator = torch.Generator().manual_seed(0)
    memory = BlockHistory(units=3, length=2)
    states = []
    for step in (0, 2):
        chain = [tuple(torch.randn(2, 1, 4, 3, generator=generator)) for _ in range(4)]
        for unit in range(3):
            inputs = chain[unit] if linked else tuple(tensor.clone() for tensor in chain[unit])
            memory.store(unit, step, inputs, chain[unit + 1])
        states.append(chain)
    return memory, states


def test_a_run_stands_in_as_the_sum_of_its_blocks() -> None:
    memory, states = filled_memory(linked=True)
    assert memory.linked(0) and memory.linked(1)
    assert memory.nodes(1) == (2, 0)
    inputs = tuple(torch.ones(2, 1, 4, 3))
    weights = (1.5, -0.5)
    outputs = memory.predict(Span(0, 2), inputs, weights)
    one_by_one = inputs
    for unit in range(3):
        one_by_one = memory.predict(Span(unit, unit), one_by_one, weights)
    for stream in range(2):
        old, new = ([chain[unit + 1][stream] - chain[unit][stream] for unit in range(3)] for chain in states)
        expected = inputs[stream] + 1.5 * sum(new) - 0.5 * sum(old)
        torch.testing.assert_close(outputs[stream], expected)
        torch.testing.assert_close(one_by_one[stream], expected)


def test_blocks_with_something_between_them_are_not_linked() -> None:
    memory, _ = filled_memory(linked=False)
    assert not memory.linked(0)
    memory, states = filled_memory(linked=True)
    memory.store(1, 3, states[1][1], states[1][2])
    assert not memory.linked(0) and not memory.linked(1)


def one_summary(
    transformer: ScriptedTransformer, values: list[float], **settings: Any
) -> tuple[list[float], dict[str, Any]]:
    engine = scripted_engine(transformer, num_steps=len(values), **settings)
    try:
        return transformer.run(values), engine.summary()
    finally:
        engine.remove()


def one_generation(transformer: ScriptedTransformer, values: list[float], **settings: Any) -> tuple[list[float], Any]:
    outputs, summary = one_summary(transformer, values, **settings)
    return outputs, summary["plan"]["0"]


def believed(step: int, nodes: tuple[int, ...], residuals: tuple[float, ...], order: int, weight: float) -> float:
    """numpy's polynomial through the nodes (oldest first), its highest term believed with ``weight``."""
    full = np.polyval(np.polyfit(nodes, residuals, len(nodes) - 1), step)
    if order == 0 or len(nodes) <= order:
        return full
    lower = np.polyval(np.polyfit(nodes[1:], residuals[1:], len(nodes) - 2), step)
    return lower + weight * (full - lower)


CURVES = {
    "residual": lambda step: 3.0,
    "taylor-1": lambda step: 3.0 - 0.25 * step,
    "taylor-2": lambda step: 3.0 - 0.25 * step + 0.125 * step**2,
}
DEGREES = list(CURVES)


@pytest.mark.parametrize("curve", DEGREES)
@pytest.mark.parametrize("approximation", DEGREES)
def test_exact_on_residuals_of_that_degree_and_on_no_higher(approximation: str, curve: str) -> None:
    """Steps 0, 1 and 3 are computed, then three reuse: nodes 3, 1, 0 are not evenly spaced."""
    residual = CURVES[curve]
    values = growing_values([2.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    transformer = ScriptedTransformer(residual, lambda step: 2 * residual(step), lambda step: -0.5)
    outputs, plan = one_generation(transformer, values, use_cache="Tea", rel_l1_thresh=0.5, approximation=approximation)
    assert [row[0] for row in plan] == [1, 1, 0, 1, 0, 0, 0, 1]
    exact = [value + 3 * residual(step) - 0.5 for step, value in enumerate(values)]
    errors = np.abs(np.array(outputs) - exact)
    assert errors[[0, 1, 3, 7]].max() < 1e-5
    if DEGREES.index(curve) <= DEGREES.index(approximation):
        assert errors[4:7].max() < 1e-4
    else:
        assert errors[4:7].min() > 0.1


def test_values_of_every_order_by_hand() -> None:
    """Residual step^2, computed at 0, 1, 3; at step 5 reuse gives 9, the secant 17, the parabola 25."""
    values = growing_values([2.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    expected = {"residual": 9.0, "taylor-1": 17.0, "taylor-2": 25.0}
    for approximation, residual in expected.items():
        transformer = ScriptedTransformer(lambda step: float(step**2), lambda step: 0.0)
        outputs, _ = one_generation(
            transformer, values, use_cache="Tea", rel_l1_thresh=0.5, approximation=approximation
        )
        assert outputs[5] == pytest.approx(values[5] + residual, rel=1e-5)


BY_HAND = {
    "base": {"rel_l1_thresh": 0.1},
    "matched": {"rel_l1_thresh": 0.1, "enable_adacorrection": True},
    "budget": {"enable_adacorrection": True, "adacorr_budget": 0.6},
    "bound": {"enable_adacorrection": True, "adacorr_tolerance": 0.05},
}


@pytest.mark.parametrize("correction", BY_HAND)
@pytest.mark.parametrize("method", ["Tea", "Fb"])
@pytest.mark.parametrize("approximation", DEGREES)
def test_outputs_follow_from_the_plan(method: str, approximation: str, correction: str) -> None:
    """Whatever was decided, and whether blocks are remembered one by one or as a whole: a block that is not evaluated
    adds the polynomial through its last residuals (numpy's fit here), corrected with the weight that is reported.
    """
    curves = (lambda step: 1.0 + 0.01 * step**2, lambda step: 2.0 + 0.1 * step, lambda step: -0.02 * step**2)
    values = growing_values([2.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    settings = {"use_cache": method, "approximation": approximation} | BY_HAND[correction]
    outputs, summary = one_summary(ScriptedTransformer(*curves), values, **settings)
    plan, weights, order = summary["plan"]["0"], summary["weights"]["0"], DEGREES.index(approximation)
    known: list[list[tuple[int, float]]] = [[], [], []]
    for step, (value, row, output) in enumerate(zip(values, plan, outputs, strict=True)):
        for block, evaluated in enumerate(row):
            if evaluated:
                known[block] = [*known[block], (step, curves[block](step))][-order - 1 :]
            nodes, residuals = zip(*known[block], strict=True)
            value += believed(step, nodes, residuals, order, 1.0 if evaluated else weights[step][block])
        assert output == pytest.approx(value, rel=1e-4)
    assert 0 < sum(row[1] for row in plan) < len(plan)


@contextmanager
def carried_out(toy: Toy, plan: list[list[int]], weights: list[list[float]], order: int) -> Iterator[None]:
    """A cache of a few lines: each block keeps its own last residuals and does what plan and weights say."""

    def obeying(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        steps = iter(range(len(plan)))
        history: list[tuple[int, tuple[torch.Tensor, ...]]] = []

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                step = next(steps)
                names = ("encoder_hidden_states", "hidden_states")
                inputs = args[:1] if toy.family == "dit" else tuple(kwargs[name] for name in names)
                if plan[step][index]:
                    output = original(*args, **kwargs)
                    outputs = (output,) if toy.family == "dit" else output
                    history.insert(0, (step, tuple(b - a for a, b in zip(inputs, outputs, strict=True))))
                    return output
                (newest, residuals), *older = history
                if order == 1 and older:
                    slope = weights[step][index] * (step - newest) / (newest - older[0][0])
                    residuals = tuple(a + slope * (a - b) for a, b in zip(residuals, older[0][1], strict=True))
                stood_in = tuple(a + r for a, r in zip(inputs, residuals, strict=True))
                return stood_in[0] if toy.family == "dit" else stood_in

            return forward

        return wrap

    with ExitStack() as stack:
        for index, block in enumerate(toy.blocks):
            stack.enter_context(wrapped(block, "forward", obeying(index)))
        yield


@pytest.mark.parametrize("method", ["Tea", "Fb"])
@pytest.mark.parametrize("correction", BY_HAND)
@pytest.mark.parametrize("approximation", ["residual", "taylor-1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_on_real_blocks(toy: Toy, approximation: str, correction: str, method: str) -> None:
    thresholds = {"dit": {"Tea": 0.2, "Fb": 0.08}, "flux": {"Tea": 0.4, "Fb": 0.6}}
    settings = {"approximation": approximation, "num_steps": 8} | BY_HAND[correction]
    settings["rel_l1_thresh"] = thresholds[toy.family][method]
    if correction == "bound":
        settings["adacorr_tolerance"] = 0.2
    with attached(toy.pipeline, "transformer", method, **settings) as engine:
        outputs = drive(toy.transformer, 8)
        summary = engine.summary()
    assert 0 < summary["hit_rate"] < 1
    with carried_out(toy, summary["plan"]["0"], summary["weights"]["0"], order=int(approximation == "taylor-1")):
        expected = drive(toy.transformer, 8)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_budget_extrapolates_over_the_steps_it_did_not_pay_for() -> None:
    """Linear residuals: AdaCorrection's default stand-in is taylor-1, and every evaluation that finds it right is
    reason to believe it more.
    """
    transformer = ScriptedTransformer(lambda step: 1.0 + step, lambda step: 5.0 - 0.5 * step)
    settings = {"use_cache": "Tea", "enable_adacorrection": True, "adacorr_budget": 0.5}
    outputs, plan = one_generation(transformer, [1.0] * 20, **settings)
    assert sum(row[0] for row in plan) == 10
    missed = [abs(output - (7.0 + 0.5 * step)) for step, output in enumerate(outputs)]
    opening = next(step for step, row in enumerate(plan) if not row[0])
    settled = [miss for step, miss in enumerate(missed) if step > opening + 3 and not plan[step][0]]
    assert len(settled) > 3 and max(settled) < 0.1 and settled[-1] < 1e-2
