"""On every mesh the trajectory has one plan, one process's images, and no collective in a skipped step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from pool import Pool, loaded, mesh_of

from xfuser import apply_cache_on_pipeline
from xfuser.config import ParallelConfig
from xfuser.model_executor.parallel import parallelize

MESHES: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "cfg": {"use_cfg_parallel": True},
    "pipefusion": {"pipefusion_parallel_degree": 2, "warmup_steps": 100},
    "data": {"data_parallel_degree": 2},
}
STEPS = 12
COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *("broadcast", "broadcast_object_list", "batch_isend_irecv", "send", "recv", "reduce", "gather"),
)


class Counter:
    """Counts calls of torch.distributed's collectives while it is switched on."""

    def __init__(self) -> None:
        self.count = 0
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Counter:
        for name in COLLECTIVES:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(self._originals[name]))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        return call


@dataclass(frozen=True)
class Seen:
    """What one rank has seen: the learned-from image, the cached one, the plan, and collectives step by step."""

    uncached: np.ndarray
    cached: np.ndarray
    plan: list[int]
    digest: str
    collectives: list[int]


def generate_twice(parallel: dict[str, Any], settings: dict[str, Any], folder: str) -> Seen:
    """Generate twice, learning and cached, on the mesh or, without degrees, on one process."""
    of = loaded("tiny-dit")
    whole = of.pipeline.transformer
    of.pipeline.transformer = copy.deepcopy(whole)  # a stage gives the other stages' weights away
    own = os.path.join(folder, f"rank{dist.get_rank() if dist.is_initialized() else 'alone'}")
    settings = {"store": own} | settings
    if parallel:
        spread = parallelize(of.pipeline, mesh_of(ParallelConfig(**parallel)), **settings)
        engine, remove = spread.trajectory, spread.remove
    else:
        engine = apply_cache_on_pipeline(of.pipeline, **settings)
        remove = engine.remove
    try:
        uncached = of.generate([1, 8], [11, 12], STEPS)
        with Counter() as counter:
            taken, step = [0], of.pipeline.scheduler.step

            def counted(*args: Any, **kwargs: Any) -> Any:
                result = step(*args, **kwargs)
                taken.append(counter.count)
                return result

            of.pipeline.scheduler.step = counted
            try:
                cached = of.generate([1, 8], [11, 12], STEPS)
            finally:
                of.pipeline.scheduler.step = step
        summary = engine.summary()
        return Seen(uncached, cached, summary["plan"], summary["plan_digest"], np.diff(taken).tolist())
    finally:
        remove()
        of.pipeline.transformer = whole


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_share_one_plan_and_one_process_s_images(two: Pool, tmp_path: Path, mesh: str) -> None:
    _check(two, tmp_path, MESHES[mesh])


def test_four_processes_share_one_plan(four: Pool, tmp_path: Path) -> None:
    _check(four, tmp_path, {"use_cfg_parallel": True, "ulysses_degree": 2})


def _check(pool: Pool, folder: Path, parallel: dict[str, Any]) -> None:
    settings = {"adacorr_budget": 0.4}
    outcomes = pool.call(generate_twice, parallel, settings, str(folder))
    # With each branch on ranks of its own, none is evaluated alone.
    apart = {"branches_apart": False} if "use_cfg_parallel" in parallel else {}
    one = generate_twice({}, settings | apart, str(folder))
    assert len({outcome.digest for outcome in outcomes}) == 1
    for outcome in outcomes:
        assert outcome.plan == one.plan
        assert 0 in outcome.plan
        assert np.abs(outcome.uncached - one.uncached).max() < 1e-4
        assert np.abs(outcome.cached - one.cached).max() < 1e-4
        skipped = [count for count, kind in zip(outcome.collectives, outcome.plan, strict=True) if kind == 0]
        assert skipped == [0] * len(skipped)
        evaluated = [count for count, kind in zip(outcome.collectives, outcome.plan, strict=True) if kind]
        assert "data_parallel_degree" in parallel or min(evaluated) > 0, "the counter counts nothing"


def test_what_one_process_learned_parts_no_branches_where_each_has_its_rank(two: Pool, tmp_path: Path) -> None:
    store = tmp_path / "shared"
    parts = generate_twice({}, {"adacorr_budget": 0.45, "store": store}, str(tmp_path))
    assert 1 in parts.plan
    one = generate_twice({}, {"adacorr_budget": 0.45, "branches_apart": False}, str(tmp_path / "apart"))
    settings = {"adacorr_budget": 0.45, "store": store}
    for outcome in two.call(generate_twice, {"use_cfg_parallel": True}, settings, str(tmp_path)):
        assert set(outcome.plan) == {0, 2} and outcome.plan == one.plan
        assert np.abs(outcome.cached - one.cached).max() < 1e-4
