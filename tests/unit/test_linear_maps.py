"""FastCache's linear maps: fitted, anchored, and never random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import (
    ALWAYS,
    FAMILIES,
    Toy,
    attached,
)

from xfuser.model_executor.cache.blocks.history import Reference
from xfuser.model_executor.cache.calibration.linear import FULL_CHANNELS, RIDGE, LinearMap, LinearMaps


def applied(fitted: LinearMap, change: torch.Tensor) -> torch.Tensor:
    return fitted.add_to(torch.zeros_like(change), change)


def test_a_linear_relation_is_found_up_to_the_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 6, generator=generator)
    inputs = torch.randn(4000, 6, generator=generator)
    fitted = LinearMap()
    fitted.learn(inputs, inputs @ truth)
    assert torch.equal(applied(fitted, torch.zeros(1, 6)), torch.zeros(1, 6))
    square = inputs.double().T @ inputs.double()
    ridge = RIDGE * square.diagonal().mean()
    expected = torch.linalg.inv(square + ridge * torch.eye(6)) @ square @ truth.double()
    torch.testing.assert_close(fitted.matrix.double(), expected, rtol=1e-4, atol=1e-5)
    # Inputs of the same size in every direction: the ridge shrinks the map by 1 + RIDGE.
    torch.testing.assert_close(fitted.matrix * (1 + RIDGE), truth, rtol=0.1, atol=0.1)
    change = torch.randn(2, 3, 6, generator=generator)
    torch.testing.assert_close(applied(fitted, change), change @ fitted.matrix)
    outputs = torch.randn(2, 3, 6, generator=generator)
    expected = outputs + change @ fitted.matrix
    torch.testing.assert_close(fitted.add_to(outputs, change), expected)


def test_later_evaluations_count_more() -> None:
    """One channel: square and cross of the older pair count 0.7 times: (0.7·4·2 + 9·5) / (1.3 · (0.7·4 + 9))."""
    fitted = LinearMap()
    fitted.learn(torch.tensor([[2.0]]), torch.tensor([[4.0]]))
    fitted.learn(torch.tensor([[3.0]]), torch.tensor([[15.0]]))
    assert applied(fitted, torch.ones(1, 1)).item() == pytest.approx((0.7 * 8 + 45) / (1.3 * (0.7 * 4 + 9)))


def test_above_the_limit_every_channel_has_a_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(FULL_CHANNELS + 1, generator=generator)
    inputs = torch.randn(50, FULL_CHANNELS + 1, generator=generator)
    fitted = LinearMap()
    fitted.learn(inputs, inputs * slopes)
    square = inputs.square().sum(0)
    expected = slopes * square / (square + RIDGE * square.mean())
    slope = applied(fitted, torch.ones(2, 3, FULL_CHANNELS + 1))
    assert fitted.matrix.dim() == 1
    torch.testing.assert_close(slope, expected.expand(2, 3, -1))
    narrow = LinearMap()
    narrow.learn(inputs[:, :FULL_CHANNELS], inputs[:, :FULL_CHANNELS])
    applied(narrow, inputs[:1, :FULL_CHANNELS])
    assert narrow.matrix.shape == (FULL_CHANNELS, FULL_CHANNELS)


@pytest.mark.parametrize("channels", [8, FULL_CHANNELS + 1])
def test_where_nothing_moved_the_residual_is_reused(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, later = torch.randn(3, 1, 4, channels, generator=generator)
    maps = LinearMaps()
    older, newer = (Reference(step, (inputs,), (outputs,)) for step in (0, 1))
    maps.learn(0, older, newer)
    assert torch.equal(maps.predict(0, (later,), newer)[0], later + (outputs - inputs))
    assert torch.equal(LinearMaps().predict(0, (later,), newer)[0], later + (outputs - inputs))


def test_streams_and_blocks_have_maps_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = LinearMaps()
    slopes = {(block, stream): 0.5 + block + 2 * stream for block in (0, 1) for stream in (0, 1)}
    references = {}
    for block in (0, 1):
        pairs = []
        for step in (0, 1):
            streams = tuple(torch.randn(2, 1, 300, 3, generator=generator))
            outputs = tuple(each * (1 + slopes[block, stream]) for stream, each in enumerate(streams))
            pairs.append(Reference(step, streams, outputs))
        maps.learn(block, *pairs)
        references[block] = pairs[1]
    for block, reference in references.items():
        inputs = tuple(torch.randn(2, 1, 300, 3, generator=generator))
        outputs = maps.predict(block, inputs, reference)
        for stream in (0, 1):
            change = inputs[stream] - reference.inputs[stream]
            slope = (outputs[stream] - inputs[stream] - slopes[block, stream] * reference.inputs[stream]) / change
            assert float(slope.median()) * (1 + RIDGE) == pytest.approx(slopes[block, stream], rel=0.1)


def test_the_newest_pair_is_learned_when_the_map_is_applied() -> None:
    """One channel. A pair that is followed by another one before anything stood in is left out."""
    inputs, outputs = [0.0, 1.0, 3.0, 4.0], [0.0, 9.0, 15.0, 20.0]
    evaluations = [
        Reference(step, (torch.full((1, 1, 1), x),), (torch.full((1, 1, 1), y),))
        for step, (x, y) in enumerate(zip(inputs, outputs, strict=True))
    ]
    maps = LinearMaps()

    def slope(reference: Reference) -> float:
        (result,) = maps.predict(0, (reference.inputs[0] + 1,), reference)
        return result.item() - reference.outputs[0].item() - 1

    maps.learn(0, *evaluations[:2])
    maps.learn(0, *evaluations[1:3])
    assert {id(each) for each in maps.tensors()} == {id(t) for each in evaluations[1:3] for t in each.tensors()}
    # The input moved by 2, the residual by 4.
    for _ in range(2):
        assert slope(evaluations[2]) == pytest.approx(8 / (4 * (1 + RIDGE)))
        assert list(maps.tensors()) == []
    # Then by 1 and 4.
    maps.learn(0, *evaluations[2:])
    assert slope(evaluations[3]) == pytest.approx((0.7 * 8 + 4) / ((0.7 * 4 + 1) * (1 + RIDGE)))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_random(family: str) -> None:
    """Two engines on two pipelines of the same weights give the same bits, whatever the global generator says."""
    images = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        toy = Toy.build(family)
        with attached(toy.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, motion_threshold=0.3):
            images.append(toy.images(10))
    assert np.array_equal(*images)
