"""Calibrations that come with tiny-dit: how two are compared, and whose seconds a new one may take."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmark.compare_calibrations import check, judge, load_for, table_of
from benchmark.measure import Sampling
from scripts.calibrate_shipped import take_timing
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit

SHIPPED = shipped_tiny_dit() / "calibration" / "trajectory"
LEARNED_FROM = 1 << 29


def test_a_copy_differs_by_nothing_and_costs_no_more_than_was_asked(tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(SHIPPED / "ddim-20.safetensors", copy)
    files = [SHIPPED / "ddim-20.safetensors", copy]
    known = check(files, 2, 7)
    loaded = load_for(known[0])
    loaded.pipeline.set_progress_bar_config(disable=True)
    rows = judge(loaded, files, [0.5, 0.3], Sampling(2, 2, known[0].steps, 1.5, 7))
    assert [(row["budget"], row["calibration"]) for row in rows] == [
        (budget, path.name) for budget in (0.5, 0.3) for path in files
    ]
    for original, copied in zip(rows[::2], rows[1::2], strict=True):
        assert copied["images"] == original["images"]
        assert copied["psnr_difference"]["value"] == 0
        assert original["budget"] - 0.1 < copied["cost"] <= original["budget"] + 1e-9
    assert rows[0]["psnr"]["value"] > rows[2]["psnr"]["value"] > 30
    assert table_of(rows).row_count == 4


def test_what_needs_no_calibration_is_judged_beside_it() -> None:
    files = [SHIPPED / "ddim-20.safetensors"]
    loaded = load_for(check(files, 2, 7)[0])
    loaded.pipeline.set_progress_bar_config(disable=True)
    own, fewer, line = judge(loaded, files, [0.3], Sampling(2, 2, 20, 1.5, 7), opponents=True)
    assert (fewer["calibration"], line["calibration"]) == ("6 steps", "order 1 at 6 even steps")
    assert fewer["cost"] == line["cost"] == pytest.approx(0.3)
    assert own["psnr"]["value"] > max(fewer["psnr"]["value"], line["psnr"]["value"])
    assert fewer["images"] != line["images"]
    assert "forward" not in vars(loaded.pipeline.transformer)


def test_a_file_of_another_scheduler_brings_its_scheduler() -> None:
    (known,) = check([SHIPPED / "dpm++2m-25.safetensors"], 2, 7)
    assert type(load_for(known).pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert known.steps == 25


def test_different_numbers_of_steps_are_not_compared() -> None:
    with pytest.raises(ValueError, match="another scheduler or number of steps"):
        check([SHIPPED / "ddim-20.safetensors", SHIPPED / "ddim-50.safetensors"], 2, 7)


@pytest.mark.parametrize("seed", [LEARNED_FROM, LEARNED_FROM - 1, LEARNED_FROM + 15])
def test_images_that_were_learned_from_do_not_judge(seed: int) -> None:
    with pytest.raises(ValueError, match="judge by others"):
        check([SHIPPED / "ddim-20.safetensors"], 2, seed)


def test_the_images_next_to_those_learned_from_do() -> None:
    for seed in (LEARNED_FROM - 2, LEARNED_FROM + 16):
        check([SHIPPED / "ddim-20.safetensors"], 2, seed)


def test_seconds_are_taken_from_a_file_of_the_same_grid_only(tmp_path: Path) -> None:
    known = Calibration.load(SHIPPED / "ddim-20.safetensors")
    measured = known.timing
    known.timing = {"denoiser": 9.0, "outside": 1.0, "half_share": 0.9}
    take_timing(known, SHIPPED / "ddim-20.safetensors")
    assert known.timing == measured
    with pytest.raises(ValueError, match="another model, scheduler or number of steps"):
        take_timing(known, SHIPPED / "ddim-28.safetensors")
    known.save(tmp_path / "saved.safetensors", compact=True)
    assert Calibration.load(tmp_path / "saved.safetensors").timing == measured
