"""AdaCache on scripted residuals whose metric can be computed by hand, and on real blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import ALL_FAMILIES, SCRIPTED, Toy, attached

from xfuser.config import CacheConfig, ParallelConfig
from xfuser.model_executor.adapters import BlockGroup
from xfuser.model_executor.cache import CacheEngine
from xfuser.model_executor.parallel import check_combination

STEPS = 14
Residual = Callable[[int], torch.Tensor]


class Attention(nn.Module):
    """Gives what the step alone says."""

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.residual(1000 - int(timestep)).expand_as(hidden_states)


class Block(nn.Module):
    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.attn = Attention(residual)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.attn(hidden_states, timestep)


class Transformer(nn.Module):
    def __init__(self, *residuals: Residual) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(each) for each in residuals)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep=timestep)
        return hidden_states


ATTENDING = dataclasses.replace(SCRIPTED, groups=(BlockGroup("blocks", self_attention=("attn",)),))


def evaluated(residual: Residual, steps: int, known: bool = True, **settings: Any) -> list[int]:
    """Which steps are evaluated where the middle block's attention gives this; the others give something else."""
    transformer = Transformer(lambda step: torch.tensor(float(step + 1)), residual, lambda step: torch.tensor(7.0))
    settings = {"num_steps": steps} | settings if known else settings
    engine = CacheEngine(transformer, ATTENDING, CacheConfig(use_cache="Ada", **settings))
    for step in range(steps):
        transformer(torch.ones(1, 8, 4), timestep=torch.tensor(1000 - step))
    (rows,) = engine.summary()["plan"].values()
    engine.remove()
    assert all(len(set(row)) == 1 for row in rows), "one rate for all blocks"
    return [step for step, row in enumerate(rows) if row[0]]


def numbers(*values: float) -> Residual:
    return lambda step: torch.tensor(values[min(step, len(values) - 1)])


@pytest.mark.parametrize(
    ("settings", "residual", "expected"),
    [
        # Nothing moves: c = 0 at step 1, so 6 steps to the next one; the last two always.
        ({}, numbers(1.0), [0, 1, 7, 13, 18, 19]),
        ({"ada_codebook": "slow"}, numbers(1.0), [0, 1, 4, 7, 10, 13, 16, 18, 19]),
        ({"ada_codebook": "long"}, numbers(1.0), [0, 1, 13, 18, 19]),
        # From 1 to 1.25 in one step: c = .25, in [.24, .32): 3 steps. Then nothing for 3 steps: c = 0, 6 steps.
        ({}, numbers(1.0, 1.25), [0, 1, 4, 10, 16, 18, 19]),
        # A fall counts as a rise does: |.5 - 1| / 1 = .5, beyond the table: 1 step. |.5 - .5| = 0.
        ({}, numbers(1.0, 0.5), [0, 1, 2, 8, 14, 18, 19]),
        # c is per step: from 1 at step 1 to 2 at step 7 is 1 / 1 / 6 = .167: 4 steps.
        ({}, numbers(*[1.0] * 7, 2.0), [0, 1, 7, 11, 17, 18, 19]),
        # The limit itself is beyond it: .125 is not below .16 / 1.28 = .125, which lets it have 4 steps instead of 5.
        ({"ada_scale": 1 / 1.28}, numbers(1.0, 1.125), [0, 1, 5, 11, 17, 18, 19]),
        # Nothing is below 0: always what the table has beyond its limits.
        ({"ada_scale": 0.0}, numbers(1.0), list(range(20))),
        ({"ada_scale": 0.0, "ada_codebook": "long"}, numbers(1.0), [0, 1, 4, 7, 10, 13, 16, 18, 19]),
        # A residual of zero says nothing.
        ({}, numbers(0.0), list(range(20))),
    ],
)
def test_the_codebook_says_when_the_next_step_is_evaluated(
    settings: dict[str, Any], residual: Residual, expected: list[int]
) -> None:
    assert evaluated(residual, 20, **settings) == expected


def test_without_a_known_end_the_last_steps_are_like_the_others() -> None:
    assert evaluated(numbers(1.0), 12, known=False) == [0, 1, 7]


def frames(*values: float) -> torch.Tensor:
    """A residual [1, 8, 4] of 4 frames of 2 tokens, each of one value."""
    return torch.tensor(values).repeat_interleave(2)[None, :, None].expand(1, 8, 4)


def test_motion_regularises_the_metric_of_a_video() -> None:
    """c·(m + |10 (m − m_prev) / k|), m = Σ|frame − frame before| / Σ|frames|, from the numbers by hand."""
    still = frames(1.0, 1.0, 1.0, 1.0)
    # Step 1: c = 1/4 (one frame of four has gone from 1 to 2), m = 1/5, nothing before: c·m = .05, 6 steps.
    moving = frames(1.0, 1.0, 1.0, 2.0)
    # Step 7: c = (2 + 2 + 2 + 0) / 5 / 6 = .2; m = 1·|2 − 3| / 11 = 1/11, and m_prev = 1/5:
    # .2·(.0909 + 10·.1091/6) = .0545, 6 steps.
    later = frames(3.0, 3.0, 3.0, 2.0)

    def residual(step: int) -> torch.Tensor:
        return still if step == 0 else moving if step < 7 else later

    assert evaluated(residual, 20, ada_frames=4) == [0, 1, 7, 13, 18, 19]
    # Without frames c alone counts: .25 has 3 steps; at step 4 c = 0 has 6; at 10 c = 6/5/6 = .2 has 4.
    assert evaluated(residual, 20) == [0, 1, 4, 10, 14, 18, 19]
    # With a tenth of the limits .05 is beyond .04 (.40 / 10): 1 step; then c = 0.
    assert evaluated(residual, 20, ada_frames=4, ada_scale=0.1)[:3] == [0, 1, 2]


def test_tokens_that_are_no_whole_number_of_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="^ada_frames=3: there are 8 tokens, which are no whole number of frames$"):
        evaluated(numbers(1.0), 4, ada_frames=3)


def test_a_model_without_attention_is_refused_in_one_line() -> None:
    transformer = Transformer(numbers(1.0))
    with pytest.raises(
        TypeError, match="^use_cache='Ada' looks at the middle block's attention, and a Block has none$"
    ):
        CacheEngine(transformer, SCRIPTED, CacheConfig(use_cache="Ada"))
    assert not any("forward" in vars(module) for module in transformer.modules())


def test_frames_are_refused_where_they_lie_on_several_ranks() -> None:
    config, ranks = CacheConfig(use_cache="Ada", ada_frames=4), ParallelConfig(ulysses_degree=2)
    with pytest.raises(ValueError, match="^ada_frames compares frames that lie on several ranks; leave it out"):
        check_combination(config, ranks)
    check_combination(config, ParallelConfig(data_parallel_degree=2))
    check_combination(CacheConfig(use_cache="Ada"), ranks)


@pytest.mark.parametrize("correction", [{}, {"enable_adacorrection": True}], ids=["alone", "corrected"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_on_real_blocks(toy: Toy, correction: dict[str, Any]) -> None:
    """A scale of 0 and the fast table never hit; others do, the second generation is the first, nothing is left."""
    with attached(toy.pipeline, "pipeline", "Ada", ada_scale=0.0, **correction) as engine:
        assert np.array_equal(toy.images(STEPS), toy_plain(engine, toy))
        assert engine.summary()["hit_rate"] == 0
    with attached(toy.pipeline, "pipeline", "Ada", ada_codebook="slow", ada_scale=4.0, **correction) as engine:
        first, second = toy.images(STEPS), toy.images(STEPS)
        summary = engine.summary()
    assert np.array_equal(first, second) and 0.2 < summary["hit_rate"] < 0.9
    assert not np.array_equal(first, toy.plain_images(STEPS))
    assert np.array_equal(toy.images(STEPS), toy.plain_images(STEPS))


def toy_plain(engine: CacheEngine, toy: Toy) -> np.ndarray:
    """Images without a cache, while one is attached."""
    engine.paused = True
    try:
        return toy.images(STEPS)
    finally:
        engine.paused = False
