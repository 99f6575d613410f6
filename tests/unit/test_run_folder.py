"""The folder of a run: an earlier one is replaced or gone on with, and never mixed with a new one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xfuser import cli
from xfuser.model_executor.pipelines.generate import Generation, remaining_batches
from xfuser.model_executor.pipelines.loading import LoadedPipeline
from xfuser.model_executor.pipelines.outputs import Outputs, save_image

LABELS = ["--class_label", "0", "1", "8", "9", "2", "--batch_size", "2", "--num_inference_steps", "4", "--threads", "1"]
TEA = [*LABELS, "--use_cache", "Tea", "--rel_l1_thresh", "0.5"]


def generate(folder: Path, *arguments: str) -> None:
    cli.main(["generate", *arguments, "--output_dir", str(folder)])


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        generate(folder, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    generate(folder, *TEA, "--save_raw")
    return folder


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Let the pipeline fail after so many batches; the list counts those that were made."""

    original = LoadedPipeline.generate

    def arrange(batches: int) -> list[int]:
        made: list[int] = []

        def counted(self: LoadedPipeline, *args: Any, **keywords: Any) -> np.ndarray:
            if len(made) == batches:
                raise ValueError("stopped by this test")
            made.append(len(keywords["seeds"]))
            return original(self, *args, **keywords)

        monkeypatch.setattr(LoadedPipeline, "generate", counted)
        return made

    return arrange


def test_a_second_run_is_refused_before_anything_is_loaded(
    whole: Path, capsys: pytest.CaptureFixture[str], stop_after: Callable[[int], list[int]]
) -> None:
    made, before = stop_after(9), contents(whole)
    line = refusal(capsys, whole, *TEA)
    assert str(whole) in line and all(flag in line for flag in ("--output_dir", "--overwrite", "--resume"))
    assert contents(whole) == before and made == []


def test_overwriting_leaves_nothing_of_the_earlier_run(tmp_path: Path) -> None:
    generate(tmp_path, *LABELS, "--save_raw")
    (tmp_path / "notes.txt").write_text("mine")
    generate(tmp_path, "--class_label", "1", *LABELS[6:], "--overwrite", "--image_format", "jpg")
    assert sorted(contents(tmp_path)) == ["image_00000.jpg", "notes.txt", "statistics.json"]
    assert json.loads((tmp_path / "statistics.json").read_text())["images"] == ["image_00000.jpg"]


def test_a_run_that_fails_at_once_leaves_the_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stop_after: Callable[[int], list[int]]
) -> None:
    generate(tmp_path, *LABELS)
    before = contents(tmp_path)
    stop_after(0)
    assert "stopped by this test" in capsys_of_failure(capsys, tmp_path, *TEA, "--overwrite")
    assert contents(tmp_path) == before


def capsys_of_failure(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        generate(folder, *arguments)
    return capsys.readouterr().err


@pytest.mark.parametrize("batches", [1, 2])
def test_a_stopped_run_goes_on(
    batches: int,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stop_after: Callable[[int], list[int]],
) -> None:
    """Its images and pixels are then those of a run that was not stopped, bit by bit."""
    stop_after(batches)
    assert "stopped by this test" in capsys_of_failure(capsys, tmp_path, *TEA, "--save_raw")
    left = sorted(contents(tmp_path))
    assert left == [*(f"image_{index:05d}.png" for index in range(2 * batches)), "unfinished.json", "unfinished.npy"]
    assert "--resume" in refusal(capsys, tmp_path, *TEA, "--save_raw")
    made = stop_after(9)
    generate(tmp_path, *TEA, "--save_raw", "--resume")
    assert made == [2, 2, 1][batches:]
    now, expected = contents(tmp_path), contents(whole)
    told = json.loads(now.pop("statistics.json"))
    expected.pop("statistics.json")
    assert now == expected
    assert (told["generated"], len(told["images"])) == (5 - 2 * batches, 5)


def test_nothing_is_left_to_do(
    whole: Path, capsys: pytest.CaptureFixture[str], stop_after: Callable[[int], list[int]]
) -> None:
    made, before = stop_after(9), contents(whole)
    generate(whole, *TEA, "--save_raw", "--resume")
    assert made == [] and contents(whole) == before
    assert "all 5 images are there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TEA, "--save_raw", "--seed", "7"], ["with --seed 42", "with --seed 7"]),
        ([*TEA[:-2], "--save_raw"], ["with --rel_l1_thresh 0.5", "without --rel_l1_thresh"]),
        (TEA, ["with --save_raw", "without --save_raw"]),
        ([*TEA, "--save_raw", "--image_format", "webp"], ["--image_format png", "--image_format webp"]),
    ],
)
def test_other_settings_do_not_go_on(
    arguments: list[str], words: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    line = refusal(capsys, whole, *arguments, "--resume")
    assert "--resume" in line and all(word in line for word in words), line
    assert contents(whole) == before


def test_a_lost_image_is_made_again(whole: Path, tmp_path: Path, stop_after: Callable[[int], list[int]]) -> None:
    for name, held in contents(whole).items():
        (tmp_path / name).write_bytes(held)
    (tmp_path / "image_00003.png").unlink()
    made = stop_after(9)
    generate(tmp_path, *TEA, "--save_raw", "--resume")
    assert made == [2]
    now, expected = contents(tmp_path), contents(whole)
    assert {name for name in now if now[name] != expected[name]} == {"statistics.json"} and len(now) == len(expected)


def test_resuming_nothing_begins(tmp_path: Path) -> None:
    generate(tmp_path / "new", "--class_label", "1", *LABELS[6:], "--resume")
    assert sorted(contents(tmp_path / "new")) == ["image_00000.png", "statistics.json"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_formats(suffix: str, channels: int, tmp_path: Path) -> None:
    rows = np.linspace(0.1, 0.9, 16, dtype=np.float32)
    pixels = np.broadcast_to(rows[:, None, None], (16, 16, channels))
    with Image.open(save_image(pixels, tmp_path / f"image.{suffix}")) as image:
        assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix]
        read = np.asarray(image.convert("L"), dtype=np.float64) / 255
    assert np.abs(read - pixels[..., 0]).max() < (0.003 if suffix == "png" else 0.05)


def test_every_replica_keeps_a_batch() -> None:
    """One without any would have nothing to gather, and nothing to say of its cache."""
    request = Generation([0], 8, 2, 0, 4)
    none = remaining_batches(request, 2, frozenset())
    assert none == [[range(0, 2), range(2, 4)], [range(4, 6), range(6, 8)]]
    assert remaining_batches(request, 2, frozenset({0, 1, 2})) == [[range(2, 4)], none[1]]
    assert remaining_batches(request, 2, frozenset(range(8))) == [[range(2, 4)], [range(6, 8)]]


def test_what_does_not_say_how_it_was_made_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "image_00000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="does not say how its images were made"):
        Outputs(tmp_path, {}, 1, resume=True).check()
    with pytest.raises(ValueError, match="1 images"):
        Outputs(tmp_path, {}, 1).check()
    assert Outputs(tmp_path, {}, 1, overwrite=True).check() == frozenset()
