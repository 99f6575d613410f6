"""The training scripts' loop: what it has learned does not depend on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from training_scripts import import_scripts


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    return import_scripts("training")["training"]


def trained(loop: ModuleType, folder: Path, steps: int, stop: int | None = None, **plan: Any) -> Any:
    """A linear map that has learned its target for so many steps, or until the loss is asked for at step ``stop``."""
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    settings = {"learning_rate": 1e-2, "ema": 0.9, "batch_size": 8, "checkpoint_every": 2} | plan
    training = loop.Training("map", module, loop.Plan(folder, steps, **settings))
    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if training.step == stop:
            raise KeyboardInterrupt
        noise = 0.1 * torch.randn(len(indices), 4, generator=generator)
        return (module(data[indices] + noise) - data[indices].flip(1)).square().mean()

    training.run(loss_at, len(data))
    return training


def test_a_run_that_was_cut_off_ends_like_one_that_was_not(loop: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = trained(loop, tmp_path / "whole", 9)
    with pytest.raises(KeyboardInterrupt):
        trained(loop, tmp_path / "cut", 9, stop=5)
    resumed = trained(loop, tmp_path / "cut", 9)
    assert whole.step == resumed.step == 9
    assert all(torch.equal(whole.ema[key], resumed.ema[key]) for key in whole.ema)
    assert torch.equal(whole.module.weight, resumed.module.weight)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_average_follows_the_weights(loop: ModuleType, tmp_path: Path) -> None:
    training = trained(loop, tmp_path, 1)
    start, now = nn.Linear(4, 4), training.module.weight.detach().clone()
    torch.manual_seed(0)
    start = nn.Linear(4, 4).weight.detach()
    # After one step the decay is 1 / 11, the smaller of 0.9 and step / (step + 10).
    assert torch.allclose(training.ema["weight"], start / 11 + now * 10 / 11, atol=1e-6)
    assert torch.equal(training.averaged().weight, training.ema["weight"])


def test_minutes_end_a_run_and_keep_what_it_learned(loop: ModuleType, tmp_path: Path) -> None:
    training = trained(loop, tmp_path, 10**9, minutes=0.005, schedule=loop.constant_then_linear)
    assert 0 < training.step < 10**9
    again = loop.Training("map", nn.Linear(4, 4), training.plan)
    assert again.step == training.step
    assert torch.equal(again.ema["weight"], training.ema["weight"])


def test_the_rates(loop: ModuleType) -> None:
    assert [loop.cosine(done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [loop.constant_then_linear(done) for done in (0, 0.75, 0.875, 1)] == [1, 1, 0.5, 0]
