"""Rows of the comparison, and the command lines in front of the cache."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmark.cache_execute import parser as comparison_parser
from benchmark.rows import Correction, Row, build_rows, wanted_methods
from xfuser import cli
from xfuser.config.arguments import correction_settings

THRESHOLDS = {"Tea": 0.25, "Fb": 0.125}
BASES: dict[str, dict[str, Any]] = {base: {"use_cache": base} for base in ("Fast", "Interval", "Ada")}
BASES |= {base: {"use_cache": base, "rel_l1_thresh": threshold} for base, threshold in THRESHOLDS.items()}
BASES["Lazy"] = {"use_cache": "Lazy", "calibration": "gates.safetensors"}


def rows_for(*names: str, options: str = "", approximation: str | None = None) -> list[Row]:
    """Rows as the command line makes them."""
    args = comparison_parser().parse_args(["--cache_methods", *names, *options.split()])
    wanted = wanted_methods(args.cache_methods, BASES, args.enable_adacorrection)
    return build_rows(wanted, BASES, Correction(correction_settings(args, True), approximation, args.match_compute))


def names_of(rows: list[Row]) -> list[str]:
    return [row.method for row in rows]


def corrected(rows: list[Row]) -> Row:
    """The one row whose base method is reviewed."""
    (row,) = (row for row in rows if row.config.mode is not None)
    return row


TEA = ["Tea", "Tea[taylor-1]", "Tea+AdaCorrection", "None[steps of Tea]"]
FB = ["Fb", "Fb[taylor-1]", "Fb+AdaCorrection", "None[steps of Fb]"]
FAST, ADA = ([each.replace("Tea", base) for each in TEA] for base in ("Fast", "Ada"))
# It predicts no block: what stands in elsewhere is no concern of its own.
LAZY = ["Lazy", "Lazy+AdaCorrection", "None[steps of Lazy]"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["None"], ["None"]),
        (["Tea"], ["None", "Tea"]),
        (["Fb", "None", "Tea"], ["None", "Fb", "Tea"]),
        (["Tea", "Tea", "None", "None"], ["None", "Tea"]),
        (["Tea+AdaCorrection"], ["None", *TEA]),
        (["Tea", "Tea+AdaCorrection"], ["None", *TEA]),
        (["Tea+AdaCorrection", "Tea"], ["None", *TEA]),
        (["Fb+AdaCorrection", "Tea"], ["None", *FB, "Tea"]),
        # The paper's main table.
        (["All"], ["None", *FAST, *TEA, *FB, *ADA, *LAZY]),
        (["Tea", "All", "Fb"], ["None", *TEA, *FAST, *FB, *ADA, *LAZY]),
        (["Fb", "All"], ["None", *FB, *FAST, *TEA, *ADA, *LAZY]),
        (["Interval+AdaCorrection"], ["None", *(each.replace("Tea", "Interval") for each in TEA)]),
    ],
)
def test_names_order_and_duplicates(names: list[str], expected: list[str]) -> None:
    assert names_of(rows_for(*names)) == expected


def test_what_lacks_its_calibration_is_not_among_all() -> None:
    bases = BASES | {"Lazy": {"use_cache": "Lazy"}}
    assert list(wanted_methods(["All"], bases, False)) == ["Fast", "Tea", "Fb", "Ada"]


def test_enable_adacorrection_corrects_every_method_named() -> None:
    assert names_of(rows_for("Tea", "Fb", options="--enable_adacorrection")) == ["None", *TEA, *FB]
    assert names_of(rows_for("None", options="--enable_adacorrection")) == ["None"]


def test_settings_of_the_rows() -> None:
    rows = {row.method: row for row in rows_for("All")}
    assert rows["None"].base is None and rows["None"].config.use_cache is None
    for base, threshold in THRESHOLDS.items():
        opponent = rows[f"None[steps of {base}]"]
        assert (opponent.base, opponent.config, opponent.fewer_steps) == (base, rows["None"].config, True)
        group = [rows[base], rows[f"{base}[taylor-1]"], rows[f"{base}+AdaCorrection"]]
        assert [row.base for row in group] == [base] * 3
        assert [row.config.use_cache for row in group] == [base] * 3
        assert [row.config.rel_l1_thresh for row in group] == [threshold] * 3
        assert [row.config.mode for row in group] == [None, None, "budget"]
        assert [row.config.predictor for row in group] == ["residual", "taylor-1", "taylor-1"]
        assert [row.matched for row in group] == [False, False, True]


@pytest.mark.parametrize("mode", ["budget", "bound", "gate"])
def test_rows_whose_compute_is_to_match(mode: str) -> None:
    rows = rows_for("Tea+AdaCorrection", options=f"--match_compute --adacorr_mode {mode}")
    assert names_of(rows) == ["None", *TEA]
    assert (corrected(rows).config.mode, corrected(rows).matched, corrected(rows).searched) == (mode, False, True)
    assert not any(row.searched for row in rows if row.config.mode is None)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("--adacorr_mode blend", "blend"),
        ("--adacorr_budget 0.5", "--adacorr_budget"),
        ("--adacorr_tolerance 0.1", "--adacorr_tolerance"),
    ],
)
def test_what_cannot_be_searched_is_refused(options: str, word: str) -> None:
    with pytest.raises(ValueError, match="--match_compute") as caught:
        rows_for("Tea+AdaCorrection", options=f"--match_compute {options}")
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "approximation", "expected", "mode"),
    [
        ("--adacorr_tolerance 0.1", None, TEA, "bound"),
        ("--adacorr_budget 0.5", None, TEA, "budget"),
        ("", "taylor-2", ["Tea", "Tea[taylor-2]", *TEA[2:]], "budget"),
        # The correction stands in as the base method does: there is nothing to tell apart.
        ("", "residual", ["Tea", *TEA[2:]], "budget"),
        # The published blend reuses an activation, which no base method does.
        ("--adacorr_mode blend", None, ["Tea", *TEA[2:]], "blend"),
    ],
)
def test_rows_of_other_corrections(options: str, approximation: str | None, expected: list[str], mode: str) -> None:
    rows = rows_for("Tea+AdaCorrection", options=options, approximation=approximation)
    assert names_of(rows) == ["None", *expected]
    assert corrected(rows).config.mode == mode
    assert corrected(rows).matched == (mode == "budget" and "budget" not in options)


def test_an_approximation_without_a_correction_is_a_row_of_its_own() -> None:
    assert names_of(rows_for("Tea", approximation="taylor-2")) == ["None", "Tea", "Tea[taylor-2]"]
    assert names_of(rows_for("Tea", approximation="residual")) == ["None", "Tea"]


@pytest.mark.parametrize("name", ["tea", "Teacache", "+AdaCorrection", "None+AdaCorrection", "Tea+", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        rows_for("Tea", name)
    for word in ("--cache_methods", repr(name), "None", "Tea", "Fb", "Tea+AdaCorrection", "Fb+AdaCorrection", "All"):
        assert word in str(caught.value)


def test_the_command_lines_defaults() -> None:
    args = cli.build_parser().parse_args(["generate"])
    assert (args.model_type, cli.cache_method(args), args.seed, args.num_inference_steps) == ("tiny-dit", None, 42, 50)
    assert args.rel_l1_thresh is None and args.enable_adacorrection is False
    assert args.run is cli.run_generate


def settings_for(line: str) -> dict[str, Any]:
    return cli.cache_settings(cli.build_parser().parse_args(["generate", *line.split()]), THRESHOLDS)


def test_cache_settings_from_the_command_line() -> None:
    assert settings_for("") == {"use_cache": None, "approximation": None, "enable_adacorrection": False}
    assert settings_for("--use_cache Fb")["rel_l1_thresh"] == 0.125
    assert settings_for("--use_cache Fb --rel_l1_thresh 0.5")["rel_l1_thresh"] == 0.5
    assert settings_for("--use_cache Fb --rel_l1_thresh 0")["rel_l1_thresh"] == 0
    corrected = settings_for("--use_cache Tea --enable_adacorrection --adacorr_tolerance 0.2 --adacorr_gamma 2")
    assert corrected["enable_adacorrection"] is True
    assert (corrected["adacorr_tolerance"], corrected["adacorr_gamma"]) == (0.2, 2.0)


def generate(*arguments: str) -> None:
    cli.main(["generate", "--model_type", "flux", "--num_inference_steps", "4", *arguments])


def test_generate_writes_images_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate("--prompt", "a", "--output_dir", str(tmp_path), "--use_cache", "Fb")
    document = json.loads((tmp_path / "statistics.json").read_text())
    image = Image.open(tmp_path / "image_00000.png")
    assert image.size == (64, 64) and image.mode == "RGB"
    assert np.asarray(image).std() > 1
    assert document["images"] == ["image_00000.png"]
    assert (document["cache"]["method"], document["cache"]["steps"]) == ("Fb", 4)
    assert document["request"]["conditions"] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_00000.png", "statistics.json"]
    assert "hit rate" in capsys.readouterr().out


def test_generate_takes_prompts_and_seeds_in_turn(tmp_path: Path) -> None:
    """Image i has prompt i modulo their number and seed 42 + i, whatever the batch size."""
    whole, single = tmp_path / "whole", tmp_path / "single"
    common = ["--prompt", "a", "b", "--num_images", "3", "--use_cache", "None"]
    generate(*common, "--output_dir", str(whole), "--batch_size", "3")
    generate(*common, "--output_dir", str(single), "--batch_size", "1")
    pixels = [
        [np.asarray(Image.open(folder / f"image_{index:05d}.png")).astype(int) for index in range(3)]
        for folder in (whole, single)
    ]
    for together, alone in zip(*pixels, strict=True):
        assert np.abs(together - alone).max() <= 1
    assert np.abs(pixels[0][0] - pixels[0][2]).max() > 10


FLUX = ["--model_type", "flux", "--prompt", "a"]
WRONG: dict[str, list[str]] = {
    "no prompt": ["--model_type", "flux"],
    "a class for a prompt model": [*FLUX, "--class_label", "3"],
    "a negative threshold": [*FLUX, "--use_cache", "Tea", "--rel_l1_thresh", "-1"],
    "a threshold that is no number": [*FLUX, "--use_cache", "Tea", "--rel_l1_thresh", "nan"],
    "a correction that is off": [*FLUX, "--adacorr_tolerance", "0.5"],
    "a goal and a base method": [*FLUX, "--use_cache", "Tea", "--target_speedup", "2"],
    "two goals": [*FLUX, "--min_psnr", "40", "--target_speedup", "2"],
    "tolerance and budget": [*FLUX, "--enable_adacorrection", "--adacorr_budget", "0.5", "--adacorr_tolerance", "1"],
    "a gamma of 0": [*FLUX, "--enable_adacorrection", "--adacorr_gamma", "0"],
    "a budget above 1": [*FLUX, "--enable_adacorrection", "--adacorr_budget", "1.5"],
    "a prompt for a class model": ["--model_type", "dit", "--prompt", "a"],
    "a model that is not there": [*FLUX, "--model", "EMPTY"],
    "an output folder that is a file": [*FLUX, "--num_inference_steps", "1", "--output_dir", "FILE"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_wrong_arguments_say_so_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file")}
    with warnings.catch_warnings(record=True) as said, pytest.raises(SystemExit) as caught:
        warnings.simplefilter("default")
        cli.main(["generate", "--output_dir", str(tmp_path / "out"), *(places.get(each, each) for each in arguments)])
    assert caught.value.code == 2
    # What Python would have printed as well.
    assert not [str(each.message) for each in said if not issubclass(each.category, DeprecationWarning)]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("xdit generate: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--use_cache", "Nope"], ["--num_images", "0"], ["--batch_size", "x"], ["--unknown"], ["--adacorr_mode", "x"]],
)
def test_arguments_that_the_parser_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", *FLUX, *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]
