"""How many processes Ray starts, and what contradicts it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from xfuser import xFuserFluxPipeline
from xfuser.config import xFuserArgs
from xfuser.core.distributed import model_parallel_is_initialized


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ray_world_size": 2}, "--use_ray"),
        ({"vae_parallel_size": 1}, "--use_ray"),
        ({"dit_parallel_size": 3}, "--dit_parallel_size 3"),
        ({"use_ray": True, "ulysses_degree": 2, "dit_parallel_size": 1}, "--dit_parallel_size 1"),
        ({"use_ray": True, "ulysses_degree": 2, "ray_world_size": 3}, "give 2"),
        ({"use_ray": True, "ulysses_degree": 2, "vae_parallel_size": 1, "ray_world_size": 2}, "give 3"),
        ({"use_ray": True, "vae_parallel_size": 2}, "--use_parallel_vae"),
        ({"use_ray": True, "vae_parallel_size": -1}, "0 or more"),
    ],
)
def test_numbers_that_contradict_each_other(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        xFuserArgs(model="somewhere", **settings).create_config()
    assert named in str(error.value)


def test_ray_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start the script with python"):
        xFuserArgs(model="somewhere", use_ray=True).create_config()


def test_with_ray_nobody_is_met_yet() -> None:
    engine_config, _ = xFuserArgs(
        model="somewhere",
        use_ray=True,
        ulysses_degree=2,
        ray_world_size=3,
        dit_parallel_size=2,
        vae_parallel_size=1,
        use_parallel_vae=True,
    ).create_config()
    assert not model_parallel_is_initialized()
    assert engine_config.runtime_config.vae_parallel_size == 1
    # The process that decodes does it for them.
    assert not engine_config.parallel_config.use_parallel_vae


def test_a_pipeline_that_ray_was_not_told_of() -> None:
    engine_config, _ = xFuserArgs(model="nowhere", use_ray=True).create_config()
    with pytest.raises(ValueError, match="RayDiffusionPipeline"):
        xFuserFluxPipeline.from_pretrained("nowhere", engine_config)


def test_what_ray_scripts_import_besides() -> None:
    pytest.importorskip("ray")
    path = importlib.import_module("xfuser.ray.pipeline.pipeline_utils")
    assert not hasattr(path, "__path__")
    with pytest.raises(ImportError, match="GPUExecutor is not carried over: use .*RayDiffusionPipeline"):
        path.GPUExecutor  # noqa: B018


def test_what_changes_nothing_is_taken() -> None:
    xFuserArgs(model="somewhere", trust_remote_code=True, dit_parallel_size=2, use_ray=True, ulysses_degree=2)
