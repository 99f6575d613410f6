"""A calibration file that does not fit is refused before the model is loaded, in words of flags."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from xfuser import cli
from xfuser.model_executor.pipelines.model_types import shipped_tiny_dit

SHIPPED = shipped_tiny_dit() / "calibration"
BLOCKS, TRAJECTORY = SHIPPED / "ddim-20.safetensors", SHIPPED / "trajectory" / "ddim-20.safetensors"
TEA, GOAL = ["--use_cache", "Tea"], ["--adacorr_budget", "0.3"]
CORRECTED = [*TEA, "--enable_adacorrection"]
STEPS = ["--num_inference_steps", "20"]


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*unused: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("xfuser.model_executor.pipelines.load_pipeline", load)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A calibration of a model with another scheduler, and one of another kind of model."""
    for name, changed in (("scheduler", "EulerDiscreteScheduler"), ("transformer", "FluxTransformer2DModel")):
        shutil.copy(BLOCKS, tmp_path / f"{name}.safetensors")
        document = json.loads(BLOCKS.with_suffix(".json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(document | {name: changed}))
    (tmp_path / "text.safetensors").write_text("no calibration")
    shutil.copy(BLOCKS, tmp_path / "alone.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (str(BLOCKS), TEA, ["was made with 20 steps, and --num_inference_steps is 50"]),
        (str(TRAJECTORY), GOAL, ["was made with 20 steps, and --num_inference_steps is 50"]),
        (str(TRAJECTORY), [*TEA, *STEPS], ["is of the trajectory", "--target_speedup"]),
        (str(BLOCKS), [*GOAL, *STEPS], ["is of the blocks, and --adacorr_budget needs", "--level trajectory"]),
        ("auto", TEA, ["--calibration auto goes with --target_speedup"]),
        (str(TRAJECTORY), CORRECTED, ["was made with 20 steps, and --num_inference_steps is 50"]),
        (str(TRAJECTORY), [*CORRECTED, *STEPS, "--ulysses_degree", "2"], ["--use_cache Tea", "in one process only"]),
        (str(TRAJECTORY), [*CORRECTED, *STEPS, "--data_parallel_degree", "2"], ["in one process only"]),
        ("auto", [*CORRECTED, "--use_cfg_parallel"], ["in one process only", "--adacorr_budget"]),
        (str(TRAJECTORY), [*CORRECTED, *STEPS, "--resume"], ["--resume would count again"]),
        ("nowhere.safetensors", TEA, ["no such file", "xdit calibrate --output nowhere.safetensors"]),
        (
            "OTHER/scheduler.safetensors",
            [*TEA, *STEPS],
            ["made with EulerDiscreteScheduler, and this model has DDIMScheduler"],
        ),
        ("OTHER/transformer.safetensors", [*TEA, *STEPS], ["FluxTransformer2DModel", "DiTTransformer2DModel"]),
        ("OTHER/text.safetensors", TEA, ["cannot be read"]),
        ("OTHER/alone.safetensors", TEA, ["cannot be read", "alone.json"]),
        (str(BLOCKS), [*STEPS, "--use_cache", "Fb"], ["--calibration: nothing reads it with --use_cache Fb"]),
    ],
)
def test_what_does_not_fit(
    name: str, arguments: list[str], words: list[str], other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = name.replace("OTHER", str(other)), str(other / "out")
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "--class_label", "0", *arguments, "--calibration", path, "--output_dir", out])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("xdit generate: --calibration")
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize(("path", "arguments"), [(BLOCKS, TEA), (TRAJECTORY, GOAL), (TRAJECTORY, CORRECTED)])
def test_what_fits_goes_on(path: Path, arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="weights were loaded"):
        cli.main(["generate", *STEPS, *arguments, "--calibration", str(path), "--output_dir", str(tmp_path)])
