"""Families without a model type on the command line, on two ranks: those that can be spread equal one process."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool, mesh_of

from xfuser.config import ParallelConfig
from xfuser.model_executor.adapters import FAMILIES, SMALL, denoisers_of, spec_of
from xfuser.model_executor.parallel import parallelize

STEPS = 5
DEGREES: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "pipefusion": {"pipefusion_parallel_degree": 2, "warmup_steps": 100},
    "cfg": {"use_cfg_parallel": True},
}
CACHES: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": None},
    "budget": {"use_cache": "Tea", "rel_l1_thresh": 0.1, "enable_adacorrection": True, "adacorr_budget": 0.6},
}
NEW = [(name, family.spec) for family in FAMILIES if not family.types for name in family.small]


def can(spec: Any, mesh: str) -> bool:
    """Whether a family can be spread so."""
    return {"ulysses": spec.same_tokens, "ring": spec.same_tokens, "pipefusion": spec.contiguous, "cfg": True}[mesh]


CELLS = [(name, mesh) for name, spec in NEW for mesh in DEGREES if can(spec, mesh)]
REFUSED = [(name, mesh) for name, spec in NEW for mesh in DEGREES if not can(spec, mesh)]


@dataclass(frozen=True)
class Seen:
    """What one rank has seen."""

    images: np.ndarray
    summary: dict[str, Any] = field(default_factory=dict)


@cache
def built(name: str) -> Any:
    pipeline = SMALL[name].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(name: str, mesh: str | None, cached: dict[str, Any], guided: bool = False) -> Seen:
    """Two images, spread as the mesh says; collective."""
    pipeline, small = built(name), SMALL[name]
    arguments = small.call(2)
    if guided or spec_of(denoisers_of(pipeline)[0]).guidance == "batch":
        arguments |= small.guided(2)
    components = dict(pipeline.components)
    degrees = DEGREES[mesh] | {"verify_agreement": True} if mesh else {}
    if mesh == "pipefusion":  # a stage gives the other stages' weights away
        components = {key: copy.deepcopy(part) if "transformer" in key else part for key, part in components.items()}
    spread = parallelize(
        type(pipeline)(**components, **_settings(pipeline)), mesh_of(ParallelConfig(**degrees)), **cached
    )
    spread.pipeline.set_progress_bar_config(disable=True)
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        output = spread(**arguments, generator=generators, num_inference_steps=STEPS, output_type="np")
        return Seen(np.asarray(getattr(output, small.makes)), spread.summary())
    finally:
        spread.remove()


def _settings(pipeline: Any) -> dict[str, Any]:
    """What a pipeline of these is made with besides its parts."""
    known = {name: value for name, value in pipeline.config.items() if name in ("boundary_ratio", "expand_timesteps")}
    return known | ({"requires_safety_checker": False} if "safety_checker" in pipeline.components else {})


def refusal(name: str, mesh: str) -> str:
    """What a mesh that a family does not go with says, having changed nothing; collective."""
    with pytest.raises(ValueError) as caught:
        draw(name, mesh, {"use_cache": None})
    denoisers = denoisers_of(built(name))
    assert not any("forward" in vars(module) for each in denoisers for module in each.modules())
    return str(caught.value)


@pytest.mark.parametrize("cached", CACHES)
@pytest.mark.parametrize(("name", "mesh"), CELLS)
def test_two_processes_equal_one(two: Pool, name: str, mesh: str, cached: str) -> None:
    outcomes: list[Seen] = two.call(draw, name, mesh, CACHES[cached], mesh == "cfg")
    assert np.array_equal(outcomes[0].images, outcomes[1].images)
    assert len({each.summary["plan_digest"] for each in outcomes}) == 1
    calls = mesh == "cfg" and spec_of(denoisers_of(built(name))[0]).guidance == "calls"
    if calls and cached != "no cache":
        assert outcomes[0].summary["hit_rate"] > 0  # both branches decide together, which one process cannot
        return
    one = draw(name, None, CACHES[cached], mesh == "cfg")
    assert np.abs(outcomes[0].images - one.images).max() < (1e-4 if cached == "no cache" else 1e-3)
    if cached != "no cache":
        assert one.summary["hit_rate"] > 0.2
        assert outcomes[0].summary["plan_digest"] == one.summary["plan_digest"]
        assert outcomes[0].summary["collectives_per_step"] <= 1


@pytest.mark.parametrize(("name", "mesh"), REFUSED)
def test_what_cannot_be_spread_is_refused_and_left_alone(two: Pool, name: str, mesh: str) -> None:
    said = two.call(refusal, name, mesh)
    assert said[0] == said[1] and "\n" not in said[0]
    assert said[0].startswith("--") and "; use 1, and " in said[0]
