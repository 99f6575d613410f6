"""What one rank would refuse, or fail at, all of them leave alone: none waits for another that has stopped."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import SMALL, Job, Pool, alone, generate, loaded, mesh_of

from xfuser.config import ParallelConfig
from xfuser.core.distributed.agreement import Agreement
from xfuser.model_executor.parallel import ParallelPipeline, parallelize
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit
from xfuser.xdit import parallel_state
from xfuser.xdit.parallel_state import init_distributed_environment

STEPS = 4
ULYSSES = {"ulysses_degree": 2}
CFG = {"use_cfg_parallel": True}
PIPEFUSION = {"pipefusion_parallel_degree": 2}


@contextmanager
def spread_over(family: str, parallel: dict[str, Any], **settings: Any) -> Iterator[ParallelPipeline]:
    spread = parallelize(loaded(family).pipeline, mesh_of(ParallelConfig(**parallel)), **settings)
    try:
        yield spread
    finally:
        spread.remove()


def said(act: Callable[[], Any]) -> str:
    """The class and text of what is raised."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# -- the agreement itself ---------------------------------------------------------------------------------------------

ERRORS = {"refuses": ValueError("no such setting"), "lacks a file": OSError("no such file"), "fails": KeyError("gone")}


def attempted(name: str, where: tuple[int, ...]) -> str:
    agreement = Agreement(dist.group.WORLD)

    def make() -> int:
        if dist.get_rank() in where:
            raise ERRORS[name]
        return dist.get_rank()

    first = said(lambda: agreement.attempt(make))
    assert agreement.attempt(dist.get_rank) == dist.get_rank(), "the ranks are out of step"
    return first


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        ("refuses", "ValueError: no such setting", "ValueError: refused, since rank 1 refuses: no such setting"),
        ("lacks a file", "OSError: no such file", "ValueError: refused, since rank 1 refuses: no such file"),
        ("fails", "KeyError: 'gone'", "RuntimeError: stopped, since rank 1 failed: KeyError: 'gone'"),
    ],
)
def test_what_one_rank_cannot_do_none_does(two: Pool, name: str, own: str, others: str) -> None:
    assert two.call(attempted, name, (1,)) == [others, own]
    assert two.call(attempted, name, (0, 1)) == [own, own]
    assert two.call(attempted, name, ()) == ["nothing", "nothing"]


def shared(values: list[str]) -> tuple[str, int]:
    """The value, and how many values travelled."""
    with counted_broadcasts() as broadcasts:
        value = Agreement(dist.group.WORLD).shared(lambda: values[dist.get_rank()], str.lower)
    return value, broadcasts[0]


def test_a_value_travels_only_where_digests_differ(two: Pool) -> None:
    assert two.call(shared, ["plan", "plan"]) == [("plan", 0)] * 2
    assert two.call(shared, ["Plan", "pLAN"]) == [("Plan", 0), ("pLAN", 0)]
    assert two.call(shared, ["plan", "other"]) == [("plan", 1)] * 2


@contextmanager
def counted_broadcasts() -> Iterator[list[int]]:
    """How often a Python object has been broadcast inside."""
    count, original = [0], dist.broadcast_object_list

    @functools.wraps(original)
    def broadcast(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

    dist.broadcast_object_list = broadcast
    try:
        yield count
    finally:
        dist.broadcast_object_list = original


# -- guidance in calls of its own -------------------------------------------------------------------------------------

TWICE = Job("flux", CFG, {"use_cache": None}, steps=2, images=1, guided=True)
ONCE = Job("flux", CFG, {"use_cache": None}, steps=2, images=1)


def one_call_then_two() -> tuple[str, str, np.ndarray]:
    of = loaded("flux")
    with spread_over("flux", CFG):
        first, second = said(lambda: generate(ONCE, of)), said(lambda: generate(ONCE, of))
        return first, second, generate(TWICE, of)


def test_a_step_without_a_second_call_is_refused_on_all_ranks(two: Pool) -> None:
    """Also where a service catches the error and goes on with the same processes."""
    expected = alone(TWICE).images
    for first, second, images in two.call(one_call_then_two):
        assert first == second and first.startswith("ValueError: --use_cfg_parallel: ")
        assert "true_cfg_scale" in first and "\n" not in first
        assert np.abs(images - expected).max() < 1e-4


def other_scheduler_assigned() -> tuple[str, np.ndarray]:
    of = loaded("flux")
    with spread_over("flux", CFG):
        given = of.pipeline.scheduler
        try:
            of.pipeline.scheduler = type(given).from_config(given.config)
            return said(lambda: generate(ONCE, of)), generate(TWICE, of)
        finally:
            of.pipeline.scheduler = given


def test_guidance_follows_the_pipeline_s_scheduler(two: Pool) -> None:
    expected = alone(TWICE).images
    for message, images in two.call(other_scheduler_assigned):
        assert "true_cfg_scale" in message
        assert np.abs(images - expected).max() < 1e-4


# -- attaching --------------------------------------------------------------------------------------------------------


def missing_on_one(level: str, parallel: dict[str, Any]) -> tuple[str, list[str], int]:
    pipeline = loaded("tiny-dit").pipeline
    files = shipped_tiny_dit() / "calibration"
    mine = sorted((files / "trajectory" if level == "trajectory" else files).glob("*.safetensors"))[0]
    path = mine if dist.get_rank() == 0 else Path("/nowhere/mine.safetensors")
    settings = {"adacorr_budget": 0.4} if level == "trajectory" else {"use_cache": "Tea", "rel_l1_thresh": 0.1}
    message = said(lambda: parallelize(pipeline, mesh_of(ParallelConfig(**parallel)), calibration=path, **settings))
    traces = [name for name in vars(pipeline.transformer) if name in ("forward", "cache_context")]
    traces += [type(pipeline).__name__] * hasattr(type(pipeline), "called_through_xfuser")
    traces += [name for name in ("step", "set_timesteps") if name in vars(pipeline.scheduler)]
    return message, traces, sum(parameter.numel() for parameter in pipeline.transformer.parameters())


@pytest.mark.parametrize("level", ["blocks", "trajectory"])
@pytest.mark.parametrize("parallel", [ULYSSES, PIPEFUSION], ids=["ulysses", "pipefusion"])
def test_a_file_that_one_rank_lacks_leaves_all_as_they_were(two: Pool, level: str, parallel: dict[str, Any]) -> None:
    """No rank has given weights of other stages away by then."""
    whole = sum(parameter.numel() for parameter in loaded("tiny-dit").pipeline.transformer.parameters())
    outcomes = two.call(missing_on_one, level, parallel)
    assert outcomes[0][0].startswith("ValueError: refused, since rank 1 refuses: calibration")
    assert outcomes[1][0].startswith("ValueError: calibration")
    for _, traces, parameters in outcomes:
        assert traces == [] and parameters == whole


def on_another_device_on_one() -> str:
    given = loaded(SMALL).pipeline
    pipeline = type(given)(**copy.deepcopy(given.components))
    if dist.get_rank() == 1:
        pipeline.to("meta")
    return said(lambda: parallelize(pipeline, mesh_of(ParallelConfig(**ULYSSES))))


def test_a_rank_that_was_not_moved_to_its_device_stops_all(two: Pool) -> None:
    first, second = two.call(on_another_device_on_one)
    assert first.startswith("ValueError: refused, since rank 1 refuses: the pipeline is on meta")
    assert second.startswith("ValueError: the pipeline is on meta")


def recording_of(parallel: dict[str, Any]) -> str:
    of = loaded(SMALL).pipeline
    whole, of.transformer = of.transformer, copy.deepcopy(of.transformer)  # a stage gives other weights away
    try:
        with spread_over(SMALL, parallel) as spread:
            return said(spread.engine.record)
    finally:
        of.transformer = whole


RECORDED = {
    "ulysses": ULYSSES,
    "ring": {"ring_degree": 2},
    "cfg": CFG,
    "pipefusion": PIPEFUSION,
    "data": {"data_parallel_degree": 2},
}


@pytest.mark.parametrize("name", RECORDED)
def test_recording_a_part_of_an_image_is_refused(two: Pool, name: str) -> None:
    """A data-parallel replica has its images to itself."""
    for message in two.call(recording_of, RECORDED[name]):
        if name == "data":
            assert message == "nothing"
        else:
            assert message.startswith("ValueError: record() sees this rank's part") and "\n" not in message


def placed_by_a_wrong_rank() -> tuple[str, str]:
    """Every process says that it is rank 0, as scripts for one host do with the local rank; then it says nothing."""
    parallel_state._process.device = None
    try:
        return said(lambda: init_distributed_environment(rank=0)), said(init_distributed_environment)
    finally:
        parallel_state._process.device = None


def test_a_rank_that_is_told_another_number_stops_all(two: Pool) -> None:
    first, second = two.call(placed_by_a_wrong_rank)
    assert first[0].startswith(
        "ValueError: refused, since rank 1 refuses: rank=0: this process was started with rank 1"
    )
    assert second[0].startswith("ValueError: rank=0: this process was started with rank 1")
    assert first[1] == second[1] == "nothing"


# -- the trajectory ---------------------------------------------------------------------------------------------------

BUDGET = {"adacorr_budget": 0.5, "branches_apart": False}


def with_other_weights(folder: str) -> tuple[str, str, list[int]]:
    """A calibration that is the model's own on rank 0 only."""
    of = loaded(SMALL)
    path = Path(folder) / "given.safetensors"
    with spread_over(SMALL, ULYSSES, calibration="first", **BUDGET) as spread:
        of.generate([1], [0], STEPS)
        if spread.mesh.writes:
            spread.trajectory.calibration.save(path)
    dist.barrier()
    weight = of.pipeline.transformer.proj_out_1.weight.data
    kept = weight.clone()
    with spread_over(SMALL, ULYSSES, calibration=path, **BUDGET) as spread:
        weight.add_(dist.get_rank())
        try:
            first = said(lambda: of.generate([1], [0], STEPS))
        finally:
            weight.copy_(kept)
        second = said(lambda: of.generate([1], [0], STEPS))
        return first, second, spread.trajectory.summary()["plan"]


def test_a_calibration_that_does_not_fit_one_rank_is_refused_on_all(two: Pool, tmp_path: Path) -> None:
    first, second = two.call(with_other_weights, str(tmp_path))
    assert first[0].startswith("ValueError: refused, since rank 1 refuses: calibration: it was made with")
    assert second[0].startswith("ValueError: calibration: it was made with another denoiser")
    assert first[1] == second[1] == "nothing"
    assert first[2] == second[2] and 0 in first[2]


def broadcasts_of(folder: str) -> list[int]:
    """Objects that are broadcast in each of four generations: two that learn, two of another engine that has learned.

    Only the first rank stores, so that the second engine finds a calibration on that rank alone.
    """
    of, counts = loaded(SMALL), []
    for _ in range(2):
        with spread_over(SMALL, ULYSSES, store=Path(folder) / str(dist.get_rank()), **BUDGET):
            for seed in range(2):
                with counted_broadcasts() as broadcasts:
                    of.generate([1], [seed], STEPS)
                counts.append(broadcasts[0])
    return counts


def test_a_calibration_travels_once(two: Pool, tmp_path: Path) -> None:
    for learned, known, found, again in two.call(broadcasts_of, str(tmp_path)):
        assert learned > 0 and found == 1
        assert known == again == 0


def not_finite_on_one() -> list[int]:
    """How many generations were learned from, after each of two; the first ends in NaN on rank 1."""
    of = loaded(SMALL)
    scheduler, taken = of.pipeline.scheduler, [0]
    original = scheduler.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        taken[0] += 1
        if taken[0] == STEPS and dist.get_rank() == 1:
            result.prev_sample = result.prev_sample * torch.nan
        return result

    scheduler.step = step
    learned = []
    try:
        with spread_over(SMALL, ULYSSES, calibration="first", **BUDGET) as spread:
            for _ in range(2):
                of.generate([1], [0], STEPS)
                learned.append(spread.trajectory.summary()["learned_generations"])
    finally:
        del scheduler.step
    return learned


def test_what_one_rank_cannot_learn_from_none_learns_from(two: Pool) -> None:
    assert two.call(not_finite_on_one) == [[0, 1], [0, 1]]
