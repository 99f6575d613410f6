"""xDiT's Ray example and its service, on processes that Ray has really started."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import run
from PIL import Image

from xfuser import apply_cache_on_pipeline
from xfuser.model_executor.adapters.flux import build_small as build_toy_flux
from xfuser.model_executor.adapters.pixart import build_small as build_toy_pixart

pytest.importorskip("ray")

SCRIPT = Path(__file__).with_name("xdit_scripts") / "with_ray.py"
STEPS, SEED, PROMPT = 6, 3, "a small dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script has left: an example on two processes and one that decodes, then a service of one process."""
    folder = tmp_path_factory.mktemp("ray")
    build_toy_pixart().save_pretrained(folder / "alpha")
    build_toy_flux().save_pretrained(folder / "flux")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = (
        *("--model", folder / "alpha", "--service_model", folder / "flux", "--service_port", port),
        *("--height", 64, "--width", 64, "--no_use_resolution_binning", "--num_inference_steps", STEPS),
        *("--seed", SEED, "--use_ray", "--ray_world_size", 3, "--dit_parallel_size", 2, "--vae_parallel_size", 1),
        *("--use_parallel_vae", "--ulysses_degree", 2, "--use_fbcache", "--rel_l1_thresh", 0.05, "--prompt", PROMPT),
    )
    listed = folder / "jobs.json"
    listed.write_text(
        json.dumps([{"folder": str(folder), "script": str(SCRIPT), "arguments": [str(each) for each in flags]}])
    )
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    done = run(SCRIPT.with_name("run_jobs.py"), listed, **settings)
    assert done.code == 0, done.err[-3000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "seen.json").read_text())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_the_example_draws_what_one_process_draws(folder: Path) -> None:
    pipe = build_toy_pixart()
    apply_cache_on_pipeline(pipe, use_cache="Fb", rel_l1_thresh=0.05)
    image = pipe(
        prompt=[PROMPT],
        height=64,
        width=64,
        num_inference_steps=STEPS,
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]
    for name in ("first", "last", "again"):
        assert np.abs(pixels(folder / f"{name}.png") - np.asarray(image, dtype=int)).max() <= 1


def test_the_process_that_saves_has_the_images(seen: dict[str, Any]) -> None:
    """The processes that denoise have an entry each; latents need no decoder."""
    assert seen["example"]["entries"] == [False, True]
    assert seen["example"]["latents"] == [1, 4, 16, 16]


def test_the_processes_cache_alike(seen: dict[str, Any]) -> None:
    first, second = seen["example"]["hit_rates"]
    assert first == second and 0.2 < first < 1


def test_a_refusal_is_the_pipelines_own_and_the_processes_go_on(folder: Path, seen: dict[str, Any]) -> None:
    refused = seen["example"]["refused"]
    assert "60" in refused and "\n" not in refused
    assert np.array_equal(pixels(folder / "again.png"), pixels(folder / "first.png"))


def test_the_service_answers_requests_of_different_sizes(seen: dict[str, Any]) -> None:
    assert seen["service"] == {"same": True, "differs": True, "is_png": True}
