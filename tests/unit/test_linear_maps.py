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

from xfuser.model_executor.cache.linear import FULL_CHANNELS, RIDGE, LinearMap, LinearMaps
from xfuser.model_executor.cache.memory import Reference


def test_a_linear_relation_is_found_up_to_the_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 6, generator=generator)
    inputs = torch.randn(4000, 6, generator=generator)
    fitted = LinearMap()
    fitted.learn(inputs, inputs @ truth)
    assert fitted.apply(torch.zeros(1, 6)) is not None
    square = inputs.double().T @ inputs.double()
    ridge = RIDGE * square.diagonal().mean()
    expected = torch.linalg.inv(square + ridge * torch.eye(6)) @ square @ truth.double()
    torch.testing.assert_close(fitted.matrix.double(), expected, rtol=1e-4, atol=1e-5)
    # Inputs of the same size in every direction: the ridge shrinks the map by 1 + RIDGE.
    torch.testing.assert_close(fitted.matrix * (1 + RIDGE), truth, rtol=0.1, atol=0.1)
    change = torch.randn(2, 3, 6, generator=generator)
    torch.testing.assert_close(fitted.apply(change), change @ fitted.matrix)


def test_later_evaluations_count_more() -> None:
    """One channel: square and cross of the older pair count 0.7 times: (0.7·4·2 + 9·5) / (1.3 · (0.7·4 + 9))."""
    fitted = LinearMap()
    fitted.learn(torch.tensor([[2.0]]), torch.tensor([[4.0]]))
    fitted.learn(torch.tensor([[3.0]]), torch.tensor([[15.0]]))
    assert fitted.apply(torch.ones(1, 1)).item() == pytest.approx((0.7 * 8 + 45) / (1.3 * (0.7 * 4 + 9)))


def test_above_the_limit_every_channel_has_a_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(FULL_CHANNELS + 1, generator=generator)
    inputs = torch.randn(50, FULL_CHANNELS + 1, generator=generator)
    fitted = LinearMap()
    fitted.learn(inputs, inputs * slopes)
    square = inputs.square().sum(0)
    expected = slopes * square / (square + RIDGE * square.mean())
    applied = fitted.apply(torch.ones(2, 3, FULL_CHANNELS + 1))
    assert fitted.matrix.dim() == 1
    torch.testing.assert_close(applied, expected.expand(2, 3, -1))
    narrow = LinearMap()
    narrow.learn(inputs[:, :FULL_CHANNELS], inputs[:, :FULL_CHANNELS])
    narrow.apply(inputs[:1, :FULL_CHANNELS])
    assert narrow.matrix.shape == (FULL_CHANNELS, FULL_CHANNELS)


@pytest.mark.parametrize("channels", [8, FULL_CHANNELS + 1])
def test_where_nothing_moved_the_residual_is_reused(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, later = torch.randn(3, 1, 4, channels, generator=generator)
    maps = LinearMaps()
    older, newer = (Reference(step, (inputs,), (outputs,)) for step in (0, 1))
    maps.learn(0, older, newer)
    assert torch.equal(maps.stand_in(0, (later,), newer)[0], later + (outputs - inputs))
    assert torch.equal(LinearMaps().stand_in(0, (later,), newer)[0], later + (outputs - inputs))


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
        outputs = maps.stand_in(block, inputs, reference)
        for stream in (0, 1):
            change = inputs[stream] - reference.inputs[stream]
            slope = (outputs[stream] - inputs[stream] - slopes[block, stream] * reference.inputs[stream]) / change
            assert float(slope.median()) * (1 + RIDGE) == pytest.approx(slopes[block, stream], rel=0.1)


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
