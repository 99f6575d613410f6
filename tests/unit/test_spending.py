"""What a base method would spend, spent on the trajectory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.metrics import psnr
from xfuser import apply_cache_on_pipeline, cli
from xfuser.config import ParallelConfig
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.model_executor.parallel import AlonePipeline, parallelize
from xfuser.model_executor.pipelines.loading import load_pipeline, shipped_tiny_dit

STEPS = 20
SHIPPED = shipped_tiny_dit() / "calibration" / "trajectory" / "ddim-20.safetensors"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    loaded = load_pipeline("tiny-dit").pipeline
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: Any, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.5, "output_type": "np"}
    return torch.from_numpy(pipeline([1, 2], generator=generator, **settings).images)


def alone(pipeline: Any, method: str) -> float:
    engine = apply_cache_on_pipeline(pipeline, use_cache=method)
    draw(pipeline)
    engine.remove()
    return 1 - engine.summary()["hit_rate"]


@pytest.mark.parametrize("method", ["Tea", "Fb"])
def test_what_the_base_method_spends_is_counted_once_and_then_spent(pipeline: Any, method: str, tmp_path: Path) -> None:
    spent = alone(pipeline, method)
    uncached = draw(pipeline)
    before = {name: set(vars(each)) for name, each in (("pipeline", pipeline), ("transformer", pipeline.transformer))}
    engine = apply_cache_on_pipeline(
        pipeline, use_cache=method, enable_adacorrection=True, calibration="auto", store=tmp_path
    )
    first = draw(pipeline)
    assert torch.equal(first, uncached)
    assert engine.summary()["asked"] == {"adacorr_budget": pytest.approx(spent)}
    second = draw(pipeline)
    assert spent - 0.1 < engine.summary()["evaluated_share"] <= spent
    assert not torch.equal(second, uncached)
    engine.remove()
    assert torch.equal(draw(pipeline), uncached)
    assert set(vars(pipeline)) == before["pipeline"] and set(vars(pipeline.transformer)) == before["transformer"]

    later = apply_cache_on_pipeline(
        pipeline, use_cache=method, enable_adacorrection=True, calibration="auto", store=tmp_path
    )
    try:
        assert torch.equal(draw(pipeline), second)  # noted beside what was learned: nothing is counted again
    finally:
        later.remove()


def test_a_file_is_used_after_one_counted_call(pipeline: Any) -> None:
    spent, uncached = alone(pipeline, "Tea"), draw(pipeline)
    engine = apply_cache_on_pipeline(pipeline, use_cache="Tea", enable_adacorrection=True, calibration=SHIPPED)
    try:
        assert torch.equal(draw(pipeline), uncached)
        draw(pipeline)
        assert engine.summary()["asked"] == {"adacorr_budget": pytest.approx(spent)}
        assert 0.3 < engine.summary()["evaluated_share"] <= spent
        assert engine.summary()["learned_generations"] == 0
    finally:
        engine.remove()


def test_a_call_of_another_kind_is_counted_anew(pipeline: Any, tmp_path: Path) -> None:
    engine = apply_cache_on_pipeline(
        pipeline, use_cache="Tea", rel_l1_thresh=0.2, enable_adacorrection=True, calibration="auto", store=tmp_path
    )
    try:
        draw(pipeline)
        other = {"num_inference_steps": 10, "guidance_scale": 1.5, "output_type": "np"}
        shares = []
        for _ in range(3):  # found out, counted, spent
            pipeline([1, 2], generator=torch.Generator().manual_seed(1), **other)
            shares.append(engine.summary()["evaluated_share"])
        assert shares[:2] == [1, 1] and shares[2] < 1
    finally:
        engine.remove()


def test_other_settings_of_the_base_method_are_counted_anew(pipeline: Any, tmp_path: Path) -> None:
    shares = []
    for interval in (2, 4):
        settings = {"use_cache": "Interval", "interval": interval, "enable_adacorrection": True}
        engine = apply_cache_on_pipeline(pipeline, calibration="auto", store=tmp_path, **settings)
        try:
            draw(pipeline)
            shares.append(engine.summary()["asked"]["adacorr_budget"])
        finally:
            engine.remove()
    # The first three steps, every second or fourth from there on, and the last one.
    assert shares == [pytest.approx(12 / STEPS), pytest.approx(8 / STEPS)]


def test_an_interrupted_count_counts_nothing(pipeline: Any, tmp_path: Path) -> None:
    uncached = draw(pipeline)
    engine = apply_cache_on_pipeline(
        pipeline, use_cache="Tea", enable_adacorrection=True, calibration="auto", store=tmp_path
    )
    decode = pipeline.vae.decode
    try:
        pipeline.vae.decode = lambda *args, **kwargs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            draw(pipeline)
        pipeline.vae.decode = decode
        assert torch.equal(draw(pipeline), uncached)
        assert engine.summary()["asked"]
    finally:
        vars(pipeline.vae).pop("decode", None)
        engine.remove()


@pytest.mark.parametrize("setting", [{"adacorr_budget": 0.4}, {"target_speedup": 2}, {"adacorr_mode": "budget"}])
def test_two_answers_to_what_is_spent_are_refused(pipeline: Any, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        apply_cache_on_pipeline(pipeline, use_cache="Tea", enable_adacorrection=True, calibration=SHIPPED, **setting)


def test_the_command_spends_on_the_trajectory_after_one_counted_batch(tmp_path: Path) -> None:
    common = ["generate", "--class_label", "0", "1", "--num_images", "6", "--batch_size", "2", "--threads", "1"]
    common += ["--num_inference_steps", str(STEPS), "--save_raw"]
    spent = ["--use_cache", "Tea", "--enable_adacorrection", "--calibration", str(SHIPPED)]
    cli.main([*common, "--output_dir", str(tmp_path / "uncached")])
    cli.main([*common, *spent, "--output_dir", str(tmp_path / "spent")])
    uncached, ours = (np.load(tmp_path / name / "images.npy") for name in ("uncached", "spent"))
    assert np.array_equal(ours[:2], uncached[:2])  # the batch that is counted is evaluated in full
    assert not np.array_equal(ours[2:], uncached[2:])
    assert psnr(ours[2:], uncached[2:]).mean() > 40
    statistics = json.loads((tmp_path / "spent" / "statistics.json").read_text())
    cache = statistics["cache"]
    assert cache["method"] == "trajectory" and cache["base"].startswith("Tea")
    assert 0.3 < cache["evaluated_share"] <= cache["asked"]["adacorr_budget"] < 0.7
    assert statistics["settings"]["cache"]["use_cache"] == "Tea"


def test_the_command_counts_compiled_blocks_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    common = ["generate", "--class_label", "0", "--num_images", "2", "--batch_size", "1", "--threads", "1"]
    common += ["--num_inference_steps", str(STEPS), "--use_cache", "Tea", "--enable_adacorrection", "--save_raw"]
    common += ["--calibration", str(SHIPPED)]
    for name, flags in (("plain", []), ("compiled", ["--use_torch_compile"])):
        cli.main([*common, *flags, "--output_dir", str(tmp_path / name)])
    plain, compiled = (np.load(tmp_path / name / "images.npy") for name in ("plain", "compiled"))
    assert np.array_equal(plain, compiled)


def test_a_pipeline_is_free_again_after_it_was_refused_or_removed(pipeline: Any) -> None:
    mesh, before = ParallelMesh(ParallelConfig(), torch.device("cpu")), set(vars(pipeline.transformer))
    blocks = [set(vars(block)) for block in pipeline.transformer.transformer_blocks]
    settings = {"use_cache": "Tea", "enable_adacorrection": True, "use_torch_compile": True}
    with pytest.raises(TypeError, match="unknown"):
        AlonePipeline(pipeline, mesh, calibration=SHIPPED, nonsense=1, **settings)
    alone = AlonePipeline(pipeline, mesh, calibration=SHIPPED, **settings)
    assert alone.gather(1) == [1] and alone.steps_done == 0
    alone.remove()
    assert set(vars(pipeline.transformer)) == before
    assert [set(vars(block)) for block in pipeline.transformer.transformer_blocks] == blocks


def test_several_ranks_are_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="counted in one process only"):
        parallelize(pipeline, ParallelConfig(), use_cache="Tea", enable_adacorrection=True, calibration="auto")
