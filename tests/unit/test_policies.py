"""The base methods on scripted inputs whose decisions and outputs can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from toys import ALWAYS, FAMILIES, ScriptedTransformer, Toy, attached, drive, growing_values, scripted_engine

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import dit, flux
from xfuser.model_executor.cache.policies.tea import TeaPolicy, TeaState
from xfuser.model_executor.cache.steps import Call

Streams = tuple[torch.Tensor, ...]


def computed_steps(transformer: ScriptedTransformer, block: int, **settings: Any) -> Callable[[list[float]], list[int]]:
    """Which steps evaluate a block, for the sample values of a generation."""

    def run(values: list[float]) -> list[int]:
        engine = scripted_engine(transformer, **settings)
        try:
            transformer.run(values)
            plan = engine.summary()["plan"]["0"]
        finally:
            engine.remove()
        return [step for step, row in enumerate(plan) if row[block]]

    return run


# Factors of 1.5 and 0.5 are exact in binary, and so are the sums of the changes of 0.5 that they make.
@pytest.mark.parametrize(
    ("threshold", "factors", "expected"),
    [
        # .5 and 1.0 stay below 1.25, 1.5 does not; then from 0 again.
        (1.25, [1.5] * 7, [0, 3, 6, 7]),
        # Reaching the threshold computes: .5 < 1 reuses, 1.0 = 1 computes.
        (1.0, [1.5] * 7, [0, 2, 4, 6, 7]),
        # A fall counts as a rise does.
        (1.25, [1.5, 0.5, 1.5, 0.5, 1.5, 0.5, 1.5], [0, 3, 6, 7]),
        # One large change computes at once, and what had been accumulated is gone: .5; 3.5; .5, 1.0; 1.5.
        (1.25, [1.5, 4.0, 1.5, 1.5, 1.5, 1.0, 1.0], [0, 2, 5, 7]),
        # Steps in which nothing moves never add up.
        (0.001, [1.0] * 6, [0, 6]),
        # The comparison is with the step before, not with the last computed one: .5 each, although 2.25 / 1 is 1.25.
        (1.1, [1.5, 1.5, 1.0], [0, 3]),
        (0.0, [1.5] * 4, [0, 1, 2, 3, 4]),
        (0.0, [1.0] * 4, [0, 1, 2, 3, 4]),
        (ALWAYS, [1.5] * 5, [0, 5]),
    ],
)
def test_tea_accumulates(threshold: float, factors: list[float], expected: list[int]) -> None:
    transformer = ScriptedTransformer(lambda step: 1.0, lambda step: 2.0)
    steps = len(factors) + 1
    run = computed_steps(transformer, 0, use_cache="Tea", rel_l1_thresh=threshold, num_steps=steps)
    assert run(growing_values(factors)) == expected
    assert [block.calls for block in transformer.blocks] == [len(expected)] * 2


def test_tea_without_a_known_end_does_not_force_the_last_step() -> None:
    transformer = ScriptedTransformer(lambda step: 1.0)
    assert computed_steps(transformer, 0, use_cache="Tea", rel_l1_thresh=ALWAYS)(growing_values([1.5, 1.5, 1.5])) == [0]


def test_tea_reuses_the_residual_of_the_whole_stack() -> None:
    transformer = ScriptedTransformer(lambda step: 1.0 + step, lambda step: 10.0 + 10 * step, lambda step: 100.0)
    engine = scripted_engine(transformer, use_cache="Tea", rel_l1_thresh=1.25, num_steps=5)
    outputs = transformer.run(growing_values([1.5, 1.5, 1.5, 1.5]))
    engine.remove()
    # Computed at 0 (residual 1 + 10 + 100), 3 (4 + 40 + 100) and 4 (5 + 50 + 100).
    assert outputs == pytest.approx([1 + 111, 1.5 + 111, 2.25 + 111, 3.375 + 144, 5.0625 + 155])


def test_tea_judges_branches_apart() -> None:
    """Of two branches, one stands still and one moves; each is compared with itself alone."""
    transformer = ScriptedTransformer(lambda step: 1.0)
    engine = scripted_engine(transformer, use_cache="Tea", rel_l1_thresh=0.75, num_steps=6)
    first = torch.ones(1, 8, 4)
    for step, value in enumerate(growing_values([1.5, 1.5, 1.5, 1.5, 1.5])):
        transformer(first, timestep=torch.tensor(1000 - step))
        transformer(first * value, timestep=torch.tensor(1000 - step))
    plan = engine.summary()["plan"]
    engine.remove()
    assert [row[0] for row in plan["0"]] == [1, 0, 0, 0, 0, 1]
    assert [row[0] for row in plan["1"]] == [1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # 498.651651 x^4 - 283.781631 x^3 + 55.8554382 x^2 - 3.82021401 x + 0.264230861, multiplied out by hand.
        (0.2, 0.7978426416 - 2.270253048 + 2.234217528 - 0.764042802 + 0.264230861),
        (0.1, 0.0498651651 - 0.283781631 + 0.558554382 - 0.382021401 + 0.264230861),
        (0.0, 0.264230861),
    ],
)
def test_flux_polynomial_has_its_highest_degree_first(change: float, expected: float) -> None:
    policy = TeaPolicy(CacheConfig(use_cache="Tea", rel_l1_thresh=100.0), flux.SPEC, 8)
    state = TeaState()
    call = Call(step=1, branch=("0",), starts_generation=False, num_steps=None)
    assert policy.propose(state, [change * 40.0, 40.0], call) is False
    assert state.accumulated == pytest.approx(expected, rel=1e-9)
    policy.propose(state, [change * 40.0, 40.0], call)
    assert state.accumulated == pytest.approx(2 * expected, rel=1e-9)
    policy.commit(state, evaluated=False)
    assert state.accumulated == pytest.approx(2 * expected, rel=1e-9)
    policy.commit(state, evaluated=True)
    assert state.accumulated == 0


def test_dit_has_no_published_polynomial_and_takes_the_identity() -> None:
    policy = TeaPolicy(CacheConfig(use_cache="Tea", rel_l1_thresh=100.0), dit.SPEC, 4)
    state = TeaState()
    policy.propose(state, [3.0, 8.0], Call(1, ("0",), False, None))
    assert state.accumulated == 0.375


@pytest.mark.parametrize("family", FAMILIES)
def test_tea_compares_what_follows_the_first_norm(toy: Toy) -> None:
    """On real blocks the signal is attention's input: normed, scaled and shifted."""
    first, signals, seen = toy.blocks[0], [], []
    attention = first.attn1 if toy.family == "dit" else first.attn
    with ExitStack() as stack:

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).clone())

        stack.callback(attention.register_forward_pre_hook(note, with_kwargs=True).remove)
        engine = stack.enter_context(attached(toy.pipeline, "transformer", "Tea", rel_l1_thresh=0))
        original = engine.policy.measure

        def measure(state: TeaState, *args: Any) -> torch.Tensor:
            sums = original(state, *args)
            signals.append((state.modulated, sums))
            return sums

        engine.policy.measure = measure
        drive(toy.transformer, 3)
    for (modulated, _), expected in zip(signals, seen, strict=True):
        torch.testing.assert_close(modulated, expected)
    for step in (1, 2):
        difference, scale = signals[step][1].tolist()
        assert difference == pytest.approx(float((seen[step] - seen[step - 1]).abs().sum()), rel=1e-5)
        assert scale == pytest.approx(float(seen[step - 1].abs().sum()), rel=1e-5)


def test_first_block_compares_with_the_last_computed_step() -> None:
    """Block 0's residual creeps: 2% a step against the step before, but 9% against the step that was computed."""
    creeping = [1.0, 1.05, 1.07, 1.09, 1.10, 1.20]
    transformer = ScriptedTransformer(
        lambda step: creeping[step], lambda step: 10.0 + step, lambda step: 100.0 + 2 * step
    )
    engine = scripted_engine(transformer, use_cache="Fb", rel_l1_thresh=0.08)
    outputs = transformer.run([1.0] * 6)
    plan = engine.summary()["plan"]["0"]
    engine.remove()
    # Against the last computed: 5%, 7%, 9% (computes), then 0.9% and 10% of 1.09.
    assert plan == [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]
    # Block 0's fresh contribution, and the others' of the last computed step.
    rest = [110.0, 110.0, 110.0, 119.0, 119.0, 125.0]
    assert outputs == pytest.approx([1 + own + other for own, other in zip(creeping, rest, strict=True)], rel=1e-6)
    assert [block.calls for block in transformer.blocks] == [6, 3, 3]


def test_first_block_at_its_threshold_computes() -> None:
    """Residuals 1, 1.5: a change of exactly 0.5."""
    for threshold, expected in ((0.5, [0, 1]), (0.5 + 1e-6, [0])):
        transformer = ScriptedTransformer(lambda step: 1.0 + 0.5 * step, lambda step: 1.0)
        assert computed_steps(transformer, 1, use_cache="Fb", rel_l1_thresh=threshold)([1.0, 1.0]) == expected


def test_first_block_does_not_force_the_last_step() -> None:
    transformer = ScriptedTransformer(lambda step: 1.0, lambda step: 1.0)
    run = computed_steps(transformer, 1, use_cache="Fb", rel_l1_thresh=ALWAYS, num_steps=4)
    assert run([1.0] * 4) == [0]


def test_first_block_with_a_residual_of_zero_never_hits() -> None:
    """Nothing can be said relative to nothing."""
    transformer = ScriptedTransformer(lambda step: 0.0, lambda step: 1.0)
    assert computed_steps(transformer, 1, use_cache="Fb", rel_l1_thresh=1.0)([1.0] * 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_of_first_block_on_real_blocks(toy: Toy) -> None:
    """Output of a hit = block 0's fresh output + what the rest added when it last ran, in every stream."""

    def streams(output: Any) -> Streams:
        return output if isinstance(output, tuple) else (output,)

    first: list[Streams] = []
    last: list[Streams] = []
    with ExitStack() as stack:
        for block, outputs in ((toy.blocks[0], first), (toy.blocks[-1], last)):
            hook = block.register_forward_hook(lambda module, args, output, to=outputs: to.append(streams(output)))
            stack.callback(hook.remove)
        engine = stack.enter_context(attached(toy.pipeline, "transformer", "Fb", rel_l1_thresh=ALWAYS))
        drive(toy.transformer, 4)
        plan = engine.summary()["plan"]["0"]
    count = len(toy.blocks)
    assert plan == [[1] * count] + [[1] + [0] * (count - 1)] * 3
    rest = [after - before for before, after in zip(first[0], last[0], strict=True)]
    assert len(rest) == (1 if toy.family == "dit" else 2)
    assert all(float(part.abs().max()) > 1e-2 for part in rest)
    for step in (1, 2, 3):
        assert float((first[step][-1] - first[0][-1]).abs().max()) > 1e-4
        for fresh, added, output in zip(first[step], rest, last[step], strict=True):
            torch.testing.assert_close(output, fresh + added)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_of_tea_on_real_blocks(toy: Toy) -> None:
    """Output of a hit = input + what the whole stack added when it last ran, in every stream."""

    def streams(output: Any) -> Streams:
        return output if isinstance(output, tuple) else (output,)

    inputs: list[Streams] = []
    last: list[Streams] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if toy.family == "dit":
            inputs.append((args[0],))
        else:
            inputs.append((kwargs["encoder_hidden_states"], kwargs["hidden_states"]))

    with ExitStack() as stack:
        stack.callback(toy.blocks[0].register_forward_pre_hook(note, with_kwargs=True).remove)
        hook = toy.blocks[-1].register_forward_hook(lambda module, args, output: last.append(streams(output)))
        stack.callback(hook.remove)
        engine = stack.enter_context(attached(toy.pipeline, "transformer", "Tea", rel_l1_thresh=ALWAYS, num_steps=4))
        drive(toy.transformer, 4)
        plan = engine.summary()["plan"]["0"]
    assert [row[0] for row in plan] == [1, 0, 0, 1]
    for step in (1, 2):
        for before, first_input, first_output, output in zip(inputs[step], inputs[0], last[0], last[step], strict=True):
            torch.testing.assert_close(output, before + (first_output - first_input))
