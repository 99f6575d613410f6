"""A corrected row goes onto the trajectory where a calibration is at hand, and the report shows what it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmark.cache_execute import parser, rows_to_run
from benchmark.rows import Correction, build_rows, on_trajectory
from evaluation.report import write_report
from xfuser.cli import main
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit

SETTINGS = {"Tea": {"use_cache": "Tea", "rel_l1_thresh": 0.06}}


def test_the_corrected_row_comes_twice() -> None:
    rows = build_rows({"Tea": True}, SETTINGS, Correction({"enable_adacorrection": True}))
    spread = on_trajectory(rows, Path("known.safetensors"))
    corrected = [row for row in spread if row.method.startswith("Tea+AdaCorrection")]
    assert [row.method for row in corrected] == ["Tea+AdaCorrection", "Tea+AdaCorrection[blocks]"]
    assert [row.trajectory for row in corrected] == [Path("known.safetensors"), None]
    assert all(row.matched for row in corrected)
    assert [row for row in spread if row not in corrected] == [row for row in rows if not row.matched]


def test_a_budget_of_its_own_stays_on_blocks() -> None:
    settings = {"enable_adacorrection": True, "adacorr_budget": 0.5}
    rows = build_rows({"Tea": True}, SETTINGS, Correction(settings))
    assert on_trajectory(rows, Path("known.safetensors")) == rows


def test_the_report_has_a_panel(tmp_path: Path) -> None:
    record = {
        "kinds": [2, 0, 1, 0],
        "weights": [[0.1], [0.1, -0.2], [0.0, 0.1], [0.2, 0.1]],
        "psnr": [(40.0, [39, 42])],
    }
    row = {"method": "None", "base": None, "speedup": 1.0, "settings": {}, "psnr": None, "fid_vs_uncached": None}
    document = {"schema": 1, "results": [dict.fromkeys(RESULT_FIELDS) | row]}
    write_report(tmp_path / "report.html", document, {"None": [np.zeros((4, 4, 1))]}, {}, {"Tea+AdaCorrection": record})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Plan, weights and predicted quality of Tea+AdaCorrection" in page


def test_a_calibration_that_nothing_would_read_is_refused() -> None:
    named = str(shipped_tiny_dit() / "calibration" / "trajectory" / "ddim-50.safetensors")
    for more in (["--cache_methods", "Tea"], ["--cache_methods", "Tea+AdaCorrection", "--adacorr_budget", "0.5"]):
        with pytest.raises(ValueError, match="is of the trajectory"):
            rows_to_run(parser().parse_args([*more, "--calibration", named]))


@pytest.mark.parametrize("flag", [["--budgets", "0.3"], ["--reference_steps", "4x"]])
def test_settings_of_the_other_level_are_refused(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", *flag])
    assert f"{flag[0]} belongs to --level trajectory" in capsys.readouterr().err


RESULT_FIELDS = (
    *("images_per_second", "seconds", "hit_rate", "flops_saved", "ssim", "fid", "fid_difference", "kid"),
    *("class_accuracy", "non_finite", "prediction_coverage", "images"),
)
