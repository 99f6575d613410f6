"""mode="blend" against AdaCorrection's equations 1 to 5, computed here in float64 from what the blocks really did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from toys import Toy, attached, drive, wrapped

STEPS = 7
BLEND = {"enable_adacorrection": True, "adacorr_mode": "blend"}


@dataclass
class Witness:
    """Inputs and fresh outputs of every evaluation by block, and what left the last block, by step."""

    inputs: list[list[np.ndarray]]
    fresh: list[list[np.ndarray]]
    final: list[np.ndarray] = field(default_factory=list)

    def blended(self, step: int, block: int) -> np.ndarray:
        """What came out of a block in the end: the next one's input."""
        return self.inputs[block + 1][step] if block + 1 < len(self.inputs) else self.final[step]


@contextmanager
def witnessed(toy: Toy) -> Iterator[Witness]:
    count = len(toy.blocks)
    witness = Witness([[] for _ in range(count)], [[] for _ in range(count)])

    def recording(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                output = original(hidden_states, *args, **kwargs)
                witness.inputs[index].append(hidden_states.double().numpy().copy())
                witness.fresh[index].append(output.double().numpy().copy())
                return output

            return forward

        return wrap

    with ExitStack() as stack:
        for index, block in enumerate(toy.blocks):
            stack.enter_context(wrapped(block, "forward", recording(index)))
        hook = toy.transformer.norm_out.register_forward_pre_hook(
            lambda _, args: witness.final.append(args[0].double().numpy().copy())
        )
        stack.callback(hook.remove)
        yield witness


def mean_token_norm(difference: np.ndarray) -> float:
    return float(np.sqrt((difference**2).sum(axis=-1)).mean())


def mean_channel_deviation(hidden: np.ndarray) -> float:
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    return float(np.sqrt((centred**2).mean(axis=-1)).mean())


@pytest.mark.parametrize(("gamma", "strength"), [(0.1, 1.0), (0.13, 0.4)])
@pytest.mark.parametrize("method", [None, "Tea", "Fb"])
def test_absolute_score_follows_the_published_equations(
    dit: Toy, method: str | None, gamma: float, strength: float
) -> None:
    settings = {"adacorr_score": "absolute", "adacorr_gamma": gamma, "adacorr_lambda": strength}
    with witnessed(dit) as witness, attached(dit.pipeline, "pipeline", method, **BLEND, **settings) as engine:
        dit.images(STEPS, batch=2)
        summary = engine.summary()
    (weights,), (offsets,) = summary["weights"].values(), summary["offsets"].values()
    seen = []
    for block in range(len(dit.blocks)):
        assert len(witness.fresh[block]) == STEPS
        assert weights[0][block] is None and offsets[0][block] is None
        np.testing.assert_allclose(witness.blended(0, block), witness.fresh[block][0], atol=1e-6)
        remembered = witness.fresh[block][0]
        for step in range(1, STEPS):
            hidden, previous = witness.inputs[block][step], witness.inputs[block][step - 1]
            score = mean_token_norm(hidden - previous) ** 2 + strength * mean_channel_deviation(hidden)
            weight = min(max(gamma * score, 0.0), 1.0)
            remembered = (1 - weight) * remembered + weight * witness.fresh[block][step]
            assert offsets[step][block] == pytest.approx(score, rel=1e-5)
            assert weights[step][block] == pytest.approx(weight, rel=1e-5)
            np.testing.assert_allclose(witness.blended(step, block), remembered, rtol=1e-5, atol=1e-5)
            seen.append(weight)
    assert 0 < min(seen) and max(seen) < 1
    assert max(seen) > 2 * min(seen)
    assert summary["hit_rate"] == 0


def test_relative_score_follows_its_definition(dit: Toy) -> None:
    """S = D^2 + lambda * |spatial - spatial of the step before| / rms of the step before."""
    gamma, strength = 4.0, 0.5
    settings = {"adacorr_score": "relative", "adacorr_gamma": gamma, "adacorr_lambda": strength}
    with witnessed(dit) as witness, attached(dit.pipeline, "pipeline", None, **BLEND, **settings) as engine:
        dit.images(STEPS)
        (offsets,) = engine.summary()["offsets"].values()
    for block in range(len(dit.blocks)):
        for step in range(1, STEPS):
            hidden, previous = witness.inputs[block][step], witness.inputs[block][step - 1]
            scale = mean_token_norm(previous)
            drift = mean_token_norm(hidden - previous) / scale
            change = abs(mean_channel_deviation(hidden) - mean_channel_deviation(previous))
            expected = drift**2 + strength * change / (scale / np.sqrt(hidden.shape[-1]))
            assert offsets[step][block] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_relative_weight_is_zero_when_nothing_moves(dit: Toy) -> None:
    """The same sample at two steps: every block gives what it gave before, though the timestep has changed."""
    sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    settings = BLEND | {"adacorr_score": "relative"}
    with witnessed(dit) as witness, attached(dit.pipeline, "transformer", None, **settings) as engine, torch.no_grad():
        for timestep in (900, 300):
            dit.transformer(sample, timestep=torch.tensor([timestep]), class_labels=torch.tensor([1]))
        summary = engine.summary()
    assert summary["steps"] == 2
    assert summary["weights"]["0"][1] == [0.0] * len(dit.blocks)
    assert summary["offsets"]["0"][1] == [0.0] * len(dit.blocks)
    for block in range(len(dit.blocks)):
        assert np.abs(witness.fresh[block][1] - witness.fresh[block][0]).max() > 1e-3
        np.testing.assert_array_equal(witness.blended(1, block), witness.fresh[block][0])


def test_absolute_score_of_something_that_does_not_move_is_its_spatial_variation(dit: Toy) -> None:
    sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    settings = {"adacorr_score": "absolute", "adacorr_gamma": 1e-9}
    with witnessed(dit) as witness, attached(dit.pipeline, "transformer", None, **BLEND, **settings) as engine:
        with torch.no_grad():
            for timestep in (900, 300):
                dit.transformer(sample, timestep=torch.tensor([timestep]), class_labels=torch.tensor([1]))
        offset = engine.summary()["offsets"]["0"][1][0]
    assert offset == pytest.approx(mean_channel_deviation(witness.inputs[0][1]), rel=1e-5)
    assert offset > 0.1


def test_a_weight_of_one_is_no_cache(dit: Toy) -> None:
    """With a large gamma every block's fresh output is taken, bit by bit."""
    expected = dit.plain_images(STEPS)
    with attached(dit.pipeline, "pipeline", None, **BLEND, adacorr_score="absolute", adacorr_gamma=1e6) as engine:
        images = dit.images(STEPS)
        (weights,) = engine.summary()["weights"].values()
    assert np.array_equal(images, expected)
    assert all(row == [1.0] * len(dit.blocks) for row in weights[1:])


def test_both_streams_of_flux_are_blended(flux: Toy) -> None:
    """The score is the image stream's; the text stream gets the same weight."""
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    fresh: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            fresh.append(original(*args, **kwargs))
            return fresh[-1]

        return forward

    first = flux.blocks[0]
    hook = first.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with wrapped(first, "forward", recording):
            settings = BLEND | {"adacorr_score": "relative", "adacorr_gamma": 20.0}
            with attached(flux.pipeline, "transformer", None, **settings) as engine:
                drive(flux.transformer, 3)
                weights = [row[0] for row in engine.summary()["weights"]["0"]]
    finally:
        hook.remove()
    remembered = fresh[0]
    for step in (1, 2):
        weight = weights[step]
        assert 0.001 < weight < 0.999
        remembered = tuple((1 - weight) * a + weight * b for a, b in zip(remembered, fresh[step], strict=True))
        for ours, theirs in zip(remembered, outputs[step], strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
