"""Every pipeline of the zoo passes one conformance suite, which also writes the support table in the docs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from pipeline_zoo import ZOO, Case
from written_tables import assert_written

from xfuser import apply_cache_on_pipeline
from xfuser.model_executor.cache.adacorrection.trajectory.following import denoiser_names

STEPS = 6
TABLE = Path(__file__).parents[2] / "docs" / "pipelines.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def draw(case: Case, pipeline: Any, seed: int = 0) -> np.ndarray:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return case.output(pipeline(**case.arguments(), num_inference_steps=STEPS, generator=generator))


@contextmanager
def counting(pipeline: Any) -> Iterator[Counter[int]]:
    """Count the denoisers' calls by scheduler step, beneath whatever is attached."""
    step, calls, taken = [0], Counter(), pipeline.scheduler.step

    def count(*_: Any) -> None:
        calls[step[0]] += 1

    def stepping(*args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        return taken(*args, **kwargs)

    stepping.__wrapped__ = taken  # type: ignore[attr-defined]
    hooks = [getattr(pipeline, name).register_forward_pre_hook(count) for name in denoiser_names(pipeline)]
    pipeline.scheduler.step = stepping
    try:
        yield calls
    finally:
        pipeline.scheduler.step = taken
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ZOO)
def test_pipeline(name: str) -> None:
    case = ZOO[name]
    pipeline = case.build()
    expected, other = draw(case, pipeline), draw(case, pipeline, seed=1)
    classes = type(pipeline), *(type(getattr(pipeline, each)) for each in denoiser_names(pipeline))

    engine = apply_cache_on_pipeline(pipeline, adacorr_budget=1.0)
    for _ in range(2):
        assert np.array_equal(draw(case, pipeline), expected), "evaluated in full, it differs from no cache"
    engine.remove()

    engine = apply_cache_on_pipeline(pipeline, adacorr_budget=0.5)
    assert np.array_equal(draw(case, pipeline), expected), "the first call is not exact"
    cached = draw(case, pipeline, seed=1)
    plan = engine.summary()["plan"]
    assert 0 in plan and engine.summary()["evaluated_share"] <= 0.5
    assert np.isfinite(cached).all() and not np.array_equal(cached, other), "a cache that hits changes nothing"
    with counting(pipeline) as calls:
        assert np.array_equal(draw(case, pipeline, seed=1), cached), "a second generation differs"
    assert [step for step, kind in enumerate(plan) if kind == 0 and calls[step]] == [], "a skipped step was evaluated"
    assert all(calls[step] for step, kind in enumerate(plan) if kind)

    _interrupt(case, pipeline)
    assert np.array_equal(draw(case, pipeline, seed=1), cached), "an exception left something behind"
    engine.remove()
    assert np.array_equal(draw(case, pipeline), expected), "removing left something behind"
    assert classes == (type(pipeline), *(type(getattr(pipeline, each)) for each in denoiser_names(pipeline)))


@pytest.mark.parametrize("name", ["FluxPipeline", "WanPipeline"])
def test_a_finer_run_comes_by_the_grid_that_the_pipeline_itself_makes(name: str) -> None:
    case = ZOO[name]
    pipeline = case.build()
    expected = draw(case, pipeline)
    engine = apply_cache_on_pipeline(pipeline, adacorr_budget=0.5, calibration_reference="4x")
    assert np.array_equal(draw(case, pipeline), expected)
    draw(case, pipeline)
    assert engine.summary()["evaluated_share"] <= 0.5
    engine.remove()


def test_group_offloading(tmp_path: Path) -> None:
    case = ZOO["PixArtAlphaPipeline"]
    images = []
    for offloaded in (False, True):
        pipeline = case.build()
        if offloaded:
            cpu = torch.device("cpu")
            pipeline.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
        engine = apply_cache_on_pipeline(pipeline, adacorr_budget=0.5, store=tmp_path / str(offloaded))
        images.append([draw(case, pipeline), draw(case, pipeline, seed=1)])
        assert engine.summary()["evaluated_share"] <= 0.5
    assert np.array_equal(images[0], images[1])


def test_model_offloading_moves_nothing_in_a_skipped_step(tmp_path: Path) -> None:
    case = ZOO["PixArtAlphaPipeline"]
    pipeline = case.build()
    expected = draw(case, pipeline)
    hook = CpuOffload(execution_device=torch.device("cpu"))
    add_hook_to_module(pipeline.transformer, hook)
    engine = apply_cache_on_pipeline(pipeline, adacorr_budget=0.5)
    assert np.array_equal(draw(case, pipeline), expected)
    draw(case, pipeline, seed=1)
    assert engine.summary()["evaluated_share"] <= 0.5
    engine.remove()
    assert np.array_equal(draw(case, pipeline), expected)


def test_a_lora_is_learned_anew() -> None:
    case = ZOO["FluxPipeline"]
    pipeline = case.build()
    engine = apply_cache_on_pipeline(pipeline, adacorr_budget=0.5)
    draw(case, pipeline)
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.transformer.add_adapter(adapter, adapter_name="style")
    for times in (2, 2):
        draw(case, pipeline)
        assert engine.summary()["learned_generations"] == times
    assert engine.summary()["evaluated_share"] <= 0.5
    pipeline.transformer.disable_adapters()
    draw(case, pipeline)
    assert engine.summary()["learned_generations"] == 3, "an adapter that is switched off is another model"
    engine.remove()


def _interrupt(case: Case, pipeline: Any) -> None:
    step, seen = pipeline.scheduler.step, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("in the middle")
        return step(*args, **kwargs)

    failing.__wrapped__ = step  # type: ignore[attr-defined]
    pipeline.scheduler.step = failing
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            draw(case, pipeline)
    finally:
        pipeline.scheduler.step = step


def test_the_docs_list_what_passes() -> None:
    assert len({case.name for case in ZOO.values()}) >= 30
    assert_written(TABLE, BEGIN, table(), END)


def table() -> str:
    """The support table: all that this module's conformance test runs."""
    lines = ["| pipeline | makes | denoiser | guidance |", "|---|---|---|---|"]
    words = {"batch": "in one batch", "calls": "in two calls", "none": "none"}
    for case in sorted(ZOO.values(), key=lambda each: (each.kind, each.name, each.guidance)):
        several = f", {case.denoisers} in turn" if case.denoisers > 1 else ""
        lines.append(f"| `{case.name}` | {case.kind} | {case.denoiser}{several} | {words[case.guidance]} |")
    return "\n".join(lines) + "\n"
