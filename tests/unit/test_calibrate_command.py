"""`xdit calibrate`, and the flags that take what it wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import maps_of, noise_of, polynomial_of, refused
from diffusers import DiTPipeline
from toys import ALWAYS, Toy, attached

from xfuser.cli import main
from xfuser.model_executor.cache import CacheEngine
from xfuser.model_executor.cache.calibration.store import Calibration
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit

# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "tiny.safetensors"
    main(["calibrate", "--num_images", "2", "--num_inference_steps", "6", "--threads", "1", "--output", str(path)])
    return path


@pytest.fixture(scope="module")
def tiny() -> Toy:
    pipeline = DiTPipeline.from_pretrained(shipped_tiny_dit()).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return Toy("dit", pipeline)


def test_the_command_says_where_a_file_is_from(command: Path) -> None:
    described = json.loads(command.with_suffix(".json").read_text())
    assert (described["model"], described["images"], described["num_steps"]) == ("tiny-dit", 2, 6)
    assert (described["scheduler"], described["guidance_scale"]) == ("DDIMScheduler", 1.5)
    assert (described["transformer"], described["blocks"]) == ("DiTTransformer2DModel", 12)
    loaded = Calibration.load(command)
    assert loaded.gram.shape == (14, 6, 6) and len(noise_of(loaded)) == 12
    assert bool(torch.isfinite(loaded.gram).all()) and all(math.isfinite(each) for each in polynomial_of(loaded))
    # Six steps leave pairs behind the settled ones.
    assert set(maps_of(loaded)) == {(block, 0) for block in range(12)}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("Tea", {"approximation": "fitted", "rel_l1_thresh": ALWAYS}),
        ("Fb", {"approximation": "fitted", "rel_l1_thresh": ALWAYS}),
        ("Interval", {"approximation": "fitted"}),
        ("Fast", {"rel_l1_thresh": ALWAYS, "significance": 0}),
        ("Tea", {"enable_adacorrection": True, "adacorr_budget": 0.6}),
        ("Fb", {"enable_adacorrection": True, "adacorr_mode": "gate", "adacorr_tolerance": 0.5}),
        ("Fb", {"enable_adacorrection": True, "adacorr_tolerance": 0.5}),
    ],
    ids=str,
)
def test_a_file_of_the_command_serves(tiny: Toy, command: Path, method: str, settings: dict[str, Any]) -> None:
    with attached(tiny.pipeline, "pipeline", method, calibration=str(command), **settings) as engine:
        images = tiny.images(6)
        summary = engine.summary()
        assert summary["calibrated"] is True
        assert summary["approximation"] == ("linear" if method == "Fast" else "fitted")
        assert np.isfinite(images).all()
        refused(lambda: tiny.images(7), "6 steps", "7")
    assert summary["hit_rate"] > 0


def test_more_images_and_the_same_ones_again(tiny: Toy, command: Path, tmp_path: Path) -> None:
    """The same command gives the same file, and another seed another one."""
    files = []
    for name, seed in (("same", "42"), ("other", "7")):
        path = tmp_path / f"{name}.safetensors"
        arguments = ["--num_images", "2", "--num_inference_steps", "6", "--threads", "1", "--seed", seed]
        main(["calibrate", *arguments, "--output", str(path)])
        files.append(Calibration.load(path))
    known = Calibration.load(command)
    assert torch.equal(files[0].gram, known.gram) and polynomial_of(files[0]) == polynomial_of(known)
    assert not torch.equal(files[1].gram, known.gram)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--output", "calibration.bin"], "safetensors"),
        (["--prompt", "a fox"], "--class_label"),
        (["--model_type", "flux"], "--prompt"),
        (["--class_label", "unicorn"], "unicorn"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", "--num_images", "1", "--num_inference_steps", "2", *arguments])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xdit calibrate:")]
    assert caught.value.code == 2
    assert len(told) == 1 and word in told[0]
    assert list(tmp_path.iterdir()) == []


def test_generate_reads_a_calibration(command: Path, tmp_path: Path) -> None:
    common = ["--num_images", "1", "--num_inference_steps", "6", "--threads", "1", "--calibration", str(command)]
    for name, arguments in {
        "fast": ["--use_cache", "Fast", "--rel_l1_thresh", "1"],
        "corrected": ["--use_cache", "Tea", "--enable_adacorrection", "--adacorr_budget", "0.6"],
        # No base method: the calibration is AdaCorrection's own.
        "alone": ["--use_cache", "None", "--enable_adacorrection", "--adacorr_budget", "0.6"],
    }.items():
        main(["generate", *common, *arguments, "--output_dir", str(tmp_path / name)])
        cache = json.loads((tmp_path / name / "statistics.json").read_text())["cache"]
        assert cache["calibrated"] is True, name


def engine_of(*arguments: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> CacheEngine:
    """The engine that a command line attaches."""
    engines: list[CacheEngine] = []
    original = CacheEngine.__init__

    def init(self: CacheEngine, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(CacheEngine, "__init__", init)
    fixed = ["--num_images", "1", "--num_inference_steps", "2", "--threads", "1", "--output_dir", str(folder)]
    main(["generate", *fixed, *arguments])
    return engines[-1]


@pytest.mark.parametrize(
    ("arguments", "setting", "value"),
    [
        (["--use_cache", "Fast", "--sync", "layer"], "sync", "layer"),
        (["--use_cache", "Fast", "--motion_threshold", "0.3"], "motion_threshold", 0.3),
        (["--use_cache", "Fast", "--significance", "0.2"], "significance", 0.2),
        (["--use_cache", "Fast", "--adaptive_threshold"], "adaptive_threshold", True),
        (["--use_cache", "Interval", "--interval", "5"], "interval", 5),
        (
            ["--use_cache", "Fb", "--enable_adacorrection", "--adacorr_mode", "gate", "--granularity", "token"],
            "granularity",
            "token",
        ),
        (["--use_cache", "Fb", "--enable_adacorrection", "--adacorr_mode", "gate", "--sync", "layer"], "sync", "layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_flag_reaches_the_engine(
    arguments: list[str], setting: str, value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = engine_of(*arguments, monkeypatch=monkeypatch, folder=tmp_path)
    assert getattr(engine.config, setting) == value
