"""A script written for xDiT gives the images of one process, on one and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xfuser.model_executor.adapters.flux import build_small as build_toy_flux

SCRIPT = Path(__file__).with_name("upstream_script.py")
SECONDS = 150
STEPS = 8
PROMPTS = ("a red cube", "two birds", "an old map")
DEGREES = {"ulysses": ("--ulysses_degree", "2"), "data": ("--data-parallel-degree", "2")}
CACHES = {
    "none": (),
    "tea corrected": ("--use_teacache", "--enable_adacorrection", "--adacorr_budget", "0.5"),
}
FAMILIES = ("flux",)  # all of them: test_xdit_generations


def command_line(folder: Path, family: str, prompts: tuple[str, ...], name: str, *flags: str) -> list[str]:
    results = folder / name
    results.mkdir(parents=True)
    return [
        *("--family", family, "--results", str(results), "--model", str(folder / "flux"), "--seed", "3"),
        *("--height", "64", "--width", "64", "--max_sequence_length", "64", "--num_inference_steps", str(STEPS)),
        *("--no_use_resolution_binning", *(("--output_type", "np") if family != "wrapped" else ()), *flags),
        *("--prompt", *prompts),
    ]


def run(processes: int, *arguments: str) -> None:
    """The script, under torchrun where there are two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    root = str(SCRIPT.parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *(launcher if processes > 1 else ()), str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that any of the tests looks at, from one process, from two, and from the script on its own."""
    folder = tmp_path_factory.mktemp("upstream")
    build_toy_flux().save_pretrained(folder / "flux")
    single, double = [], []
    for family in FAMILIES:
        for cache, flags in CACHES.items():
            name = f"{family} {cache}"
            single.append(command_line(folder, family, PROMPTS, f"one {name}", *flags))
            for group, prompts in enumerate((PROMPTS[:2], PROMPTS[2:])):
                single.append(command_line(folder, family, prompts, f"part{group} {name}", *flags))
            for kind, degrees in DEGREES.items():
                double.append(command_line(folder, family, PROMPTS, f"{kind} {name}", *flags, *degrees))
    single.append(command_line(folder, "wrapped", PROMPTS, "one wrapped"))
    double.append(command_line(folder, "wrapped", PROMPTS, "data wrapped", *DEGREES["data"]))
    for processes, jobs in ((1, single), (2, double)):
        listed = folder / f"jobs{processes}.json"
        listed.write_text(json.dumps(jobs))
        run(processes, "--jobs", str(listed))
    run(2, *command_line(folder, "flux", PROMPTS, "alone flux none", *DEGREES["ulysses"]))
    return folder


def images(folder: Path) -> np.ndarray:
    return np.stack([np.load(each) for each in sorted(folder.glob("image*.npy"))])


def ranks(folder: Path) -> list[dict]:
    return [json.loads(each.read_text()) for each in sorted(folder.glob("rank*.json"))]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_that_share_images(folder: Path, family: str, cache: str) -> None:
    one, two = folder / f"one {family} {cache}", folder / f"ulysses {family} {cache}"
    assert images(two).shape == (len(PROMPTS), 64, 64, 3)
    assert np.abs(images(one) - images(two)).max() <= 1e-4
    (alone,), both = ranks(one), ranks(two)
    assert [each["sequence"] for each in both] == [2, 2]
    assert both[0]["plan"] == both[1]["plan"] == alone["plan"]
    assert (alone["hit_rate"] > 0.2) == (cache != "none")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_groups_with_parts_of_the_prompts(folder: Path, family: str, cache: str) -> None:
    """Each group gives what one process gives for its part: the first two prompts, and the third."""
    parts = [images(folder / f"part{group} {family} {cache}") for group in range(2)]
    shared = images(folder / f"data {family} {cache}")
    assert [len(part) for part in parts] == [2, 1]
    assert np.abs(np.concatenate(parts) - shared).max() <= 1e-4


def test_the_script_under_torchrun_on_its_own(folder: Path) -> None:
    assert np.abs(images(folder / "one flux none") - images(folder / "alone flux none")).max() <= 1e-4


def test_a_pipeline_that_the_script_has_loaded_itself(folder: Path) -> None:
    names = [each.name for each in sorted((folder / "data wrapped").iterdir())]
    degrees = "dp2_cfg1_ulysses1_ring1_pp1_patch1"
    places = ("dprank0_image0", "dprank0_image1", "dprank1_image0")
    assert names == [f"flux_result_{degrees}_{place}.png" for place in places]
    one = sorted((folder / "one wrapped").iterdir())
    for index in range(2):
        pixels = [
            np.asarray(Image.open(path), dtype=int) for path in (one[index], folder / "data wrapped" / names[index])
        ]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
