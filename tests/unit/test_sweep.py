"""Sweeps over settings, their frontier, and the tables of γ and λ."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmark import cache_execute, sensitivity
from benchmark.outcomes import Run, Unreportable, check
from benchmark.rows import Row
from benchmark.sweep import RANGE, settings_of
from evaluation.report import frontier, frontier_table, frontiers, sweep_curves, write_report
from xfuser.config import CacheConfig

INTERVALS = (2, 3, 4, 6, 8)


def asked(line: str) -> tuple[list[Any], Any]:
    return cache_execute.rows_to_run(cache_execute.parser().parse_args(line.split()))


def test_names_and_settings_of_a_sweep() -> None:
    rows, sweep = asked("--cache_methods Tea+AdaCorrection Interval --sweep 4")
    names = [row.method for row in rows]
    group = ["Tea@{}", "Tea@{}[taylor-1]", "Tea@{}+AdaCorrection", "None[steps of Tea@{}]"]
    thresholds = (0.03, 0.06, 0.12, 0.24)
    expected = [name.format(value) for value in thresholds for name in group]
    assert names == ["None", *expected, *(f"Interval@{each}" for each in INTERVALS)]
    by_name = {row.method: row for row in rows}
    assert [by_name[f"Tea@{value}+AdaCorrection"].config.rel_l1_thresh for value in thresholds] == list(thresholds)
    assert [by_name[f"Interval@{each}"].config.interval for each in INTERVALS] == list(INTERVALS)
    assert by_name["Tea@0.06[taylor-1]"].base == "Tea@0.06"
    assert list(sweep.curves) == ["None", "Tea", "Tea[taylor-1]", "Tea+AdaCorrection", "Interval"]
    assert sweep.curves["Tea[taylor-1]"] == [f"Tea@{value}[taylor-1]" for value in thresholds]
    assert sorted(name for curve in sweep.curves.values() for name in curve) == sorted(names)
    assert {row.method for row in rows if row.kept} == {
        "None",
        *(name.format(0.06) for name in group),
        "Interval@4",
    }


def test_points_of_a_sweep() -> None:
    own = {"use_cache": "Fb", "rel_l1_thresh": 0.05}
    (single,) = settings_of("Fb", own, 1)
    assert single == ("Fb@0.05", own)
    thresholds = [settings["rel_l1_thresh"] for _, settings in settings_of("Fb", own, 5)]
    assert (thresholds[0], thresholds[-1]) == (0.05 * RANGE[0], 0.05 * RANGE[1])
    assert all(
        later / earlier == pytest.approx(8**0.25, rel=0.01)
        for earlier, later in zip(thresholds, thresholds[1:], strict=False)
    )
    assert asked("--sweep")[1].curves["Fb"] == [name for name, _ in settings_of("Fb", own, 5)]


@pytest.mark.parametrize(
    "line",
    [
        "--sweep --interval 5",
        "--sweep --ada_scale 2",
        "--sweep --cache_ratio_threshold 0",
        "--sweep --calibration first",
    ],
)
def test_a_sweep_refuses_what_it_would_ignore(line: str) -> None:
    with pytest.raises(ValueError) as caught:
        asked(line)
    assert str(caught.value).startswith("--") and "\n" not in str(caught.value)


def test_the_frontier_of_hand_made_points() -> None:
    points = {
        "uncached": (1.0, math.inf),
        "slow and bad": (1.0, 20.0),
        "good": (2.0, 40.0),
        "as good and slower": (1.5, 40.0),
        "as fast and worse": (2.0, 39.0),
        "the same": (2.0, 40.0),
        "fast": (4.0, 30.0),
        "nearly": (3.9, 30.1),
    }
    assert frontier(points) == ["fast", "nearly", "good", "the same", "uncached"]
    assert frontier(points, tie=0.2) == ["nearly", "good", "the same", "uncached"]
    assert frontier({}) == []


def entry(method: str, base: str | None, speedup: float, saved: float, psnr: float | None) -> dict[str, Any]:
    quality = None if psnr is None else {"value": psnr, "low": psnr - 1, "high": psnr + 1}
    return {"method": method, "base": base, "speedup": speedup, "flops_saved": saved, "psnr": quality, "settings": {}}


RESULTS = [
    entry("None", None, 1.0, 0.0, None),
    entry("Tea@0.1", "Tea@0.1", 2.0, 0.5, 40.0),
    entry("Tea@0.1+AdaCorrection", "Tea@0.1", 1.9, 0.5, 50.0),
    entry("Tea@0.2", "Tea@0.2", 3.0, 0.7, 35.0),
    entry("Tea@0.2+AdaCorrection", "Tea@0.2", 3.1, 0.7, 34.0),
    entry("None[steps of Tea@0.1]", "Tea@0.1", 2.1, 0.504, 30.0),
    entry("Fb@0.1", "Fb@0.1", 2.5, 0.6, None),
]
CURVES = {
    "None": ["None", "None[steps of Tea@0.1]"],
    "Tea": ["Tea@0.1", "Tea@0.2"],
    "Tea+AdaCorrection": ["Tea@0.1+AdaCorrection", "Tea@0.2+AdaCorrection"],
    "Fb": ["Fb@0.1"],
}


def document() -> dict[str, Any]:
    sweep = {"curves": CURVES, "frontier": frontiers(RESULTS), "left_out": {"Tea@0.01": "Tea@0.01: it never hit"}}
    return {"schema": 1, "results": RESULTS, "comparisons": [], "sweep": sweep}


def test_the_frontiers_of_time_and_of_flops() -> None:
    """Half a point of FLOPs more is no reason to be ten decibels worse; of time every bit counts."""
    assert frontiers(RESULTS) == {
        "speedup": ["Tea@0.2+AdaCorrection", "Tea@0.2", "Tea@0.1", "Tea@0.1+AdaCorrection", "None"],
        "flops_saved": ["Tea@0.2", "Tea@0.1+AdaCorrection", "None"],
    }


def test_the_report_holds_the_frontier(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", document(), {}, {})
    page = (tmp_path / "report.html").read_text()
    table = page.split("<h3>Frontier</h3>")[1].split("</table>")[0]
    assert table.count('<th scope="row">') == 5
    assert "Tea@0.1+AdaCorrection" in table and "time and FLOPs" in table and "[steps of" not in table
    assert "Tea@0.01: it never hit" in page


def test_the_frontier_in_the_terminal() -> None:
    console = Console(width=140, file=io.StringIO(), color_system=None)
    console.print(frontier_table(document()))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    found = {line[0]: line[-1] for line in lines if line and line[0].startswith(("Tea@", "None"))}
    assert found == {
        "Tea@0.2+AdaCorrection": "time",
        "Tea@0.2": "FLOPs",
        "Tea@0.1": "time",
        "Tea@0.1+AdaCorrection": "FLOPs",
        "None": "FLOPs",
    }


def test_the_picture_of_a_sweep_depends_on_its_points_and_frontier() -> None:
    sweep = document()["sweep"]
    first = sweep_curves(RESULTS, sweep)
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.format == "PNG"
    assert sweep_curves(RESULTS, sweep) == first
    assert sweep_curves(RESULTS, sweep | {"frontier": {"speedup": [], "flops_saved": []}}) != first
    joined = CURVES | {"Tea": [*CURVES["Tea"], *CURVES["Tea+AdaCorrection"]], "Tea+AdaCorrection": []}
    assert sweep_curves(RESULTS, sweep | {"curves": joined}) != first
    assert sweep_curves(RESULTS[:1], {"curves": {"None": ["None"]}, "frontier": frontiers(RESULTS[:1])})


def test_a_sweep_leaves_out_what_cannot_be_reported(tmp_path: Path) -> None:
    """Of Tea's three thresholds the first never hits, and the last skips more steps than the bound could."""
    args = cache_execute.parser().parse_args(
        "--cache_methods Tea+AdaCorrection --sweep 3 --cache_ratio_threshold 0.2 --match_compute --adacorr_mode bound "
        f"--num_images 2 --batch_size 1 --num_inference_steps 6 --output_dir {tmp_path}".split()
    )
    document = cache_execute.execute(args, Console(file=io.StringIO()))
    left_out, rows = document["sweep"]["left_out"], {row["method"]: row for row in document["results"]}
    first = ["Tea@0.1", "Tea@0.1[taylor-1]", "Tea@0.1+AdaCorrection", "None[steps of Tea@0.1]"]
    assert list(left_out) == [*first, "Tea@0.8+AdaCorrection"]
    assert all("never hit" in left_out[name] for name in first)
    assert "no setting matches" in left_out["Tea@0.8+AdaCorrection"]
    second = ["Tea@0.283", "Tea@0.283[taylor-1]", "Tea@0.283+AdaCorrection", "None[steps of Tea@0.283]"]
    assert list(rows) == ["None", *second, "Tea@0.8", "Tea@0.8[taylor-1]", "None[steps of Tea@0.8]"]
    told = rows["Tea@0.283+AdaCorrection"]["matched_compute"]
    assert abs(told["reached"] - told["target"]) <= 0.01
    assert rows["None[steps of Tea@0.8]"]["flops_saved"] == pytest.approx(4 / 6)
    assert document["sweep"]["curves"] == {
        "None": ["None", "None[steps of Tea@0.283]", "None[steps of Tea@0.8]"],
        "Tea": ["Tea@0.283", "Tea@0.8"],
        "Tea[taylor-1]": ["Tea@0.283[taylor-1]", "Tea@0.8[taylor-1]"],
        "Tea+AdaCorrection": ["Tea@0.283+AdaCorrection"],
    }
    assert [len(rows[name]["images"]) for name in ("None", *second, "Tea@0.8")] == [2, 2, 2, 2, 2, 0]
    assert "None" in document["sweep"]["frontier"]["flops_saved"]
    assert json.loads((tmp_path / cache_execute.RESULTS).read_text())["sweep"] == document["sweep"]
    page = (tmp_path / "report.html").read_text()
    assert "<h3>Frontier</h3>" in page and left_out["Tea@0.1"] in page


def hand_made_run(method: str, threshold: float, hit_rates: list[float], shade: float = 0.5) -> Run:
    row = Row(method, method, CacheConfig(use_cache="Tea", rel_l1_thresh=threshold))
    summary = {"steps": 4, "plan": {"0": [[1], [0], [0], [1]]}}
    return Run(row, images=[np.full((1, 2, 2, 1), shade)], hit_rates=hit_rates, summary=summary)


def test_a_setting_that_repeats_an_earlier_one_is_left_out_of_a_sweep_only() -> None:
    low, high = hand_made_run("Tea@1", 1.0, [0.5, 0.25]), hand_made_run("Tea@2", 2.0, [0.5, 0.25])
    for lenient in (False, True):
        check(low, [low, high], lenient)
    check(high, [low, high], lenient=False)
    with pytest.raises(Unreportable, match="Tea@2: it decided as Tea@1 did"):
        check(high, [low, high], lenient=True)
    for other in (hand_made_run("Tea@1", 1.0, [0.5, 0.5]), hand_made_run("Tea@1", 1.0, [0.5, 0.25], shade=0.4)):
        check(high, [other, high], lenient=True)


SENSITIVITY = [
    "| γ = 0.5 | 8.00 [7.00, 9.00] | – | 30.00 [29.00, 31.00] | 25.0% | 2.00 | FID 4.56, hit rate 75.2% |",
    "| γ = 1 | 8.00 [7.00, 9.00] | – | 30.00 [29.00, 31.00] | 25.0% | 2.00 | best |",
    "| λ = 1 | 8.00 [7.00, 9.00] | – | 30.00 [29.00, 31.00] | 25.0% | 2.00 | best |",
    "| λ = 2 | – | – | – | – | – | FID 4.62 |",
]


def test_the_tables_of_gamma_and_lambda() -> None:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 1, "high": value + 1}

    scores = {"fid": interval(8.0), "psnr": interval(30.0), "hit_rate": 0.25, "images_per_second": 2.0}
    names = ("None", "Fast", "γ=0.5", "γ=1, λ=1", "γ=2", "λ=0.5")
    text = sensitivity.markdown(
        {
            "model": {"name": "tiny-dit"},
            "settings": {"num_images": 8, "num_inference_steps": 20, "batch_size": 4, "seed": 1},
            "base": "Fast",
            "mode": "gate",
            "tables": {
                parameter: {f"{value:g}": sensitivity.name_of(parameter, value) for value in sensitivity.VALUES}
                for parameter in sensitivity.PARAMETERS
            },
            "results": [{"method": name, **scores} for name in names],
            "failures": {"λ=2": "λ=2: it broke"},
        }
    )
    lines = text.splitlines()
    assert all(line in lines for line in SENSITIVITY)
    assert "### Fast+AdaCorrection, mode gate: λ at γ = 1" in lines and lines[-1] == "failed: λ=2: it broke"
    assert sensitivity.PUBLISHED_TITLE == "in the paper, other models"


def test_sensitivity_runs_every_value_once(tmp_path: Path) -> None:
    args = sensitivity.parser().parse_args(
        "--use_cache Tea --rel_l1_thresh 0.3 --num_images 2 --batch_size 2 --num_inference_steps 6 "
        f"--adacorr_tolerance 0.2 --output_dir {tmp_path}".split()
    )
    document = sensitivity.execute(args, Console(file=io.StringIO()))
    rows = {row["method"]: row for row in document["results"]}
    assert list(rows) == ["None", "Tea", "γ=0.5", "γ=1, λ=1", "γ=2", "λ=0.5", "λ=2"]
    told = {
        name: (rows[name]["settings"]["adacorr_gamma"], rows[name]["settings"]["adacorr_lambda"])
        for name in rows
        if "=" in name
    }
    assert told == {"γ=0.5": (0.5, 1), "γ=1, λ=1": (1, 1), "γ=2": (2, 1), "λ=0.5": (1, 0.5), "λ=2": (1, 2)}
    assert rows["γ=0.5"]["hit_rate"] > rows["γ=2"]["hit_rate"]
    assert document["mode"] == "gate" and document["failures"] == {}
    assert json.loads((tmp_path / sensitivity.RESULTS).read_text()) == document
    assert (tmp_path / sensitivity.MARKDOWN).read_text() == sensitivity.markdown(document)
    console = Console(width=160, file=io.StringIO(), color_system=None)
    console.print(sensitivity.terminal_table(document, "adacorr_gamma"))
    assert "γ = 0.5" in console.file.getvalue()  # type: ignore[attr-defined]


def test_sensitivity_refuses_what_it_varies(tmp_path: Path) -> None:
    args = sensitivity.parser().parse_args(["--adacorr_lambda", "3", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="--adacorr_lambda"):
        sensitivity.execute(args, Console(file=io.StringIO()))
