"""On several ranks, too, the cache goes with a scheduler that is assigned later, and leaves none behind changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from pool import Job, Pool, generate, loaded, mesh_of

from xfuser import apply_cache_on_pipeline
from xfuser.config import ParallelConfig
from xfuser.model_executor.parallel import parallelize

MESHES: dict[str, dict[str, Any]] = {"ulysses": {"ulysses_degree": 2}, "cfg": {"use_cfg_parallel": True}}
TEA: dict[str, Any] = {"use_cache": "Tea", "rel_l1_thresh": 0.4}
# Where each branch of guidance has ranks of its own, none is evaluated alone.
TRAJECTORY: dict[str, Any] = {"adacorr_budget": 0.5, "calibration": "first", "branches_apart": False}


def drawn(parallel: dict[str, Any], settings: dict[str, Any]) -> tuple[np.ndarray, list[str], str]:
    """An image under a scheduler that is assigned after one was drawn, what is left, and what a new transformer gets.

    Without degrees: by one process, whose pipeline had that scheduler from the beginning.
    """
    of = loaded("flux")
    job = Job("flux", parallel, {}, steps=6, images=1, guided=True)
    kept, whole = of.pipeline.scheduler, of.pipeline.transformer
    other = type(kept).from_config(kept.config, shift=2.0)
    said = ""
    try:
        if parallel:
            engine: Any = parallelize(of.pipeline, mesh_of(ParallelConfig(**parallel)), **settings)
        else:
            of.pipeline.scheduler = other
            engine = apply_cache_on_pipeline(of.pipeline, **settings)
        try:
            if parallel:
                generate(job, of)
                of.pipeline.scheduler = other
            generate(job, of)
            image = generate(job, of)
            assert engine.summary()["hit_rate"] > 0
            if parallel:
                of.pipeline.transformer = copy.deepcopy(_plain(whole))
                try:
                    generate(job, of)
                except ValueError as error:
                    said = str(error)
                of.pipeline.transformer = whole
        finally:
            engine.remove()
        left = [name for each in (kept, other) for name in ("step", "set_timesteps") if name in vars(each)]
        left += ["class"] * hasattr(type(of.pipeline), "called_through_xfuser")
        return image, left, said
    finally:
        of.pipeline.scheduler, of.pipeline.transformer = kept, whole


def _plain(transformer: Any) -> Any:
    return type(transformer).from_config(transformer.config)


@pytest.mark.parametrize("settings", [TEA, TRAJECTORY], ids=("blocks", "trajectory"))
@pytest.mark.parametrize("mesh", MESHES)
def test_a_scheduler_assigned_after_the_first_image(two: Pool, mesh: str, settings: dict[str, Any]) -> None:
    expected, left, _ = drawn({}, settings)
    assert left == []
    for image, left, said in two.call(drawn, MESHES[mesh], settings):
        assert np.abs(image - expected).max() < 1e-3
        assert left == []
        assert "parallelize() again" in said or "attached already" in said
        assert "\n" not in said
