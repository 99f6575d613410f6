"""The command on two processes: the images of one process, and files that say what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import GENERATE, run, torchrun

TINY = ["--model", "tiny-dit", "--class_label", "0", "1", "2", "--num_images", "5", "--num_inference_steps", "12"]
TEA = ["--seed", "7", "--threads", "1", "--save_raw", "--use_cache", "Tea"]


def outcome(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    told = json.loads((folder / "statistics.json").read_text())
    names = sorted(path.name for path in folder.iterdir())
    assert names == [*told["images"], "images.npy", "statistics.json"]
    assert told["images"] == [f"image_{index:05d}.png" for index in range(5)]
    return told, np.load(folder / "images.npy")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], np.ndarray]:
    """One process, in batches of three, as the first of two replicas has."""
    folder = tmp_path_factory.mktemp("alone")
    ended = run(GENERATE, *TINY, *TEA, "--batch_size", "3", "--output_dir", folder)
    assert ended.code == 0, ended.err
    return outcome(folder)


def test_replicas_share_the_images(alone: tuple[dict[str, Any], np.ndarray], tmp_path: Path) -> None:
    """Started plainly: the command starts its processes itself."""
    ended = run(GENERATE, *TINY, *TEA, "--data_parallel_degree", "2", "--output_dir", tmp_path)
    assert ended.code == 0, ended.err
    told, images = outcome(tmp_path)
    assert np.array_equal(images, alone[1])
    assert told["mesh"]["data"] == 2 and len(told["replicas"]) == 2
    assert [len(each["plan_digests"]) for each in (told, *told["replicas"])] == [1, 1, 1]
    assert len(told["parameter_bytes"]) == 2 and told["collectives_per_step"] == 0
    assert ended.out.count("hit rate") == 1


def test_replicas_go_on_together(alone: tuple[dict[str, Any], np.ndarray], tmp_path: Path) -> None:
    """The first rank alone sees the folder; one replica misses an image, the other does its last batch again."""
    command = (GENERATE, *TINY, *TEA, "--data_parallel_degree", "2", "--output_dir", tmp_path)
    assert run(*command).code == 0
    refused = torchrun(2, *command)
    assert refused.code != 0 and len(refused.lines()) == 1 and "--overwrite" in refused.err
    (tmp_path / "image_00001.png").unlink()
    ended = torchrun(2, *command, "--resume")
    assert ended.code == 0, ended.err
    told, images = outcome(tmp_path)
    assert np.array_equal(images, alone[1])
    assert told["generated"] == 5


def test_uneven_rounds_of_replicas(alone: tuple[dict[str, Any], np.ndarray], tmp_path: Path) -> None:
    """One replica has two batches, the other one; tokens are shared besides, and the decoder's rows."""
    degrees = ["--data_parallel_degree", "2", "--ulysses_degree", "2", "--use_parallel_vae", "--batch_size", "2"]
    ended = torchrun(4, GENERATE, *TINY, *TEA, *degrees, "--output_dir", tmp_path)
    assert ended.code == 0, ended.err
    told, images = outcome(tmp_path)
    assert np.abs(images - alone[1]).max() < 1e-3
    for each in told["replicas"]:
        assert len(each["plan_digests"]) == 2 and len(set(each["plan_digests"])) == 1
        assert each["collectives_per_step"] == 1 and 0 < each["bytes_per_step"] <= 64 * 12
    assert len(told["parameter_bytes"]) == 4


def test_pipefusion_tells_its_efficiency(tmp_path: Path) -> None:
    ended = torchrun(2, GENERATE, *TINY, *TEA, "--pipefusion_parallel_degree", "2", "--output_dir", tmp_path)
    assert ended.code == 0, ended.err
    told, _ = outcome(tmp_path)
    assert told["pipefusion"]["ideal_efficiency"] == pytest.approx(2 / 3)
    assert 0 < told["pipefusion"]["measured_efficiency"] < 1
    whole = 14353552
    assert len(told["parameter_bytes"]) == 2 and all(each < 0.6 * whole for each in told["parameter_bytes"])
