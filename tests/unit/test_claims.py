"""benchmark/claims.py: its numbers by hand, and a short run of the whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmark import claims


class Slope(nn.Module):
    """A block whose factor grows by the call."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.factor * hidden_states


def watched() -> claims.Watch:
    """Inputs of one token (1, 0), (3, 0), (4, 0), outputs of 1, 2 and 3 times as much."""
    block = Slope()
    watch = claims.Watch([block])
    for factor, value in enumerate((1.0, 3.0, 4.0), start=1):
        block.factor = factor
        block(torch.tensor([[[value, 0.0]]]))
    watch.remove()
    return watch


def test_distances_by_hand() -> None:
    rows = np.array(watched().rows)
    # block, step, lag, image; outputs 6 - 1, inputs 3 - 1, 2 (3 - 1) at the same step, (2 - 1) 1 between the steps.
    assert rows[0, : claims.FIRST_SCORE].tolist() == [0, 1, 1, 0, 5, 2, 4, 1]
    assert rows[1, : claims.FIRST_SCORE].tolist() == [0, 2, 1, 0, 6, 1, 3, 3]
    assert rows[2, : claims.FIRST_SCORE].tolist() == [0, 2, 2, 0, 11, 3, 9, 2]
    # S = 2² + the deviation of (3, 0), and 2² alone; relative to an input of length 1 with a deviation of .5.
    assert rows[0, claims.FIRST_SCORE :].tolist() == pytest.approx([5.5, 4.0, 4.0 + 1.0 / np.sqrt(0.5)])


def test_the_blend_follows_its_recursion() -> None:
    blends = np.array(watched().blends)
    assert blends[:, 2].tolist() == [1.0, pytest.approx(1 / 9 + 0.5 / (3 / np.sqrt(2)))]
    weight = blends[1, 2]
    # The first blend is exact, so what is left of the step from 6 to 12 is (1 - w) 6.
    assert blends[:, 3].tolist() == [0.0, pytest.approx((1 - weight) * 6 / 12)]
    assert (blends[:, 3] <= blends[:, 4] + 1e-6).all()


def test_constants_come_from_one_half_and_judge_the_other() -> None:
    # block, step, lag, image, gap, moved, across, aged, three scores
    shown = [0, 1, 1, 0, 2.0, 1.0, 1.5, 0.5, 2.0, 1.0, 0.1]
    inside, outside = [0, 1, 1, 1, 1.9, 1.0, 9, 9, 2.0, 1.3, 0.1], [0, 1, 1, 1, 2.1, 1.0, 9, 9, 1.0, 1.3, 0.1]
    found = claims.proposition(
        np.array([shown, inside, outside, [0, 1, 2, 1, *[0.0] * 7], [0, 1, 3, 1, *[0.0] * 7]]), 2
    )
    assert found["lipschitz"] == [1.5]
    assert found["as published"]["holds"]["1"] == 0.5  # 1.5 · 2 and 1.5 · 1
    assert found["without the spatial part"]["holds"]["1"] == 0.5  # 1.95
    assert found["relative"]["holds"]["1"] == 0.0
    assert found["corrected"]["holds"]["1"] == 0.5  # 1.5 + 0.5


def test_a_short_run_tells_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num_images=2", "--batch_size=2", "--num_inference_steps=5", "--threads=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["claims", *flags, "--output_dir", str(tmp_path / "out")])
        claims.main()
    made = json.loads((tmp_path / "out" / claims.RESULTS).read_text())
    assert made["convergence"]["recursion_holds"] == 1.0
    assert made["scale"]["as published"]["saturated"] > made["scale"]["relative"]["saturated"]
    assert set(made["tolerance"]["rms_error"]) == {"0.05", "0.1", "0.2", "0.4"}
    assert "K · lag · S, S as published" in capsys.readouterr().out
