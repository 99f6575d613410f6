"""The benchmark of block caches inside evaluated steps: what a row compares with, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmark import hierarchical


def run(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hierarchical", "--num_images=1", "--threads=1", *arguments])
        hierarchical.main()


def test_a_cache_inside_saves_work_and_is_compared_at_that_work(tmp_path: Path) -> None:
    arguments = ["--num_inference_steps=28", "--budgets=.5", "--thresholds=.2", "--block_budgets=.6"]
    run(*arguments, "--output_dir", str(tmp_path / "out"))
    plain, base, corrected = json.loads((tmp_path / "out" / hierarchical.RESULTS).read_text())["results"]
    assert plain["work"] == pytest.approx(0.5) and "alone" not in plain
    for row in (base, corrected):
        assert row["work"] < plain["work"]
        assert row["alone"]["work"] <= row["work"] + 1e-9
        assert row["psnr"]["value"] < plain["psnr"]["value"]
    assert "0.6 of the blocks" in corrected["inside"]


def test_a_row_of_less_work_than_any_plan_stands_alone(tmp_path: Path) -> None:
    arguments = ["--num_inference_steps=28", "--budgets=.22", "--thresholds=9", "--block_budgets"]
    run(*arguments, "--output_dir", str(tmp_path / "out"))
    _, base = json.loads((tmp_path / "out" / hierarchical.RESULTS).read_text())["results"]
    assert base["work"] < 0.14 and "alone" not in base


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=tiny-dit"], "is guided"),
        (["--num_inference_steps=7"], "brings no calibration"),
        (["--seed", str(1 << 29)], "judge by others"),
        (["--method=Nope"], "use_cache='Nope' is not known"),
        (["--thresholds=-1"], "rel_l1_thresh=-1.0"),
        (["--block_budgets=2"], "adacorr_budget=2.0"),
        (["--budgets=1.5"], "adacorr_budget=1.5"),
        (["--budgets=.01"], "has plans from 0.16 on"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*arguments, "--output_dir", str(tmp_path / "out"))
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
