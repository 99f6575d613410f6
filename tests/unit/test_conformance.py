"""One suite that every family passes at toy size, through its pipeline. What they do not go with: test_supported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from toys import ALWAYS, LEVELS, Toy, attached, drive, wrapped

from xfuser.config import CacheConfig
from xfuser.config.methods import with_threshold
from xfuser.core.tokens import narrow_batch, part
from xfuser.model_executor.adapters import SMALL, BoundArguments, denoisers_of, dit, spec_of
from xfuser.model_executor.cache.adacorrection.trajectory.branches import sample_of
from xfuser.model_executor.cache.policies import with_threshold as with_family_threshold

STEPS = 5
SKIPPING = {"use_cache": "Tea", "rel_l1_thresh": ALWAYS}
NEVER: dict[str, dict[str, Any]] = {
    "base": {"rel_l1_thresh": 0},
    "budget of the base": {"rel_l1_thresh": 0, "enable_adacorrection": True},
    "tolerance 0": {"rel_l1_thresh": 0, "enable_adacorrection": True, "adacorr_tolerance": 0},
    "tolerance 0 against a base that always hits": {
        "rel_l1_thresh": ALWAYS,
        "enable_adacorrection": True,
        "adacorr_tolerance": 0.0,
    },
    "whole budget": {"rel_l1_thresh": ALWAYS, "enable_adacorrection": True, "adacorr_budget": 1.0},
}
HITTING: dict[str, dict[str, Any]] = {
    "Tea": SKIPPING,
    "Fb": {"use_cache": "Fb", "rel_l1_thresh": ALWAYS},
    "Interval": {"use_cache": "Interval", "interval": 2},
    "budget": {"use_cache": "Tea", "rel_l1_thresh": 0.1, "enable_adacorrection": True, "adacorr_budget": 0.6},
    "linear maps": {"use_cache": "Fb", "rel_l1_thresh": ALWAYS, "approximation": "linear"},
}

every_family = pytest.mark.parametrize("family", SMALL)


@pytest.fixture
def own(family: str) -> Toy:
    """A pipeline of the test's own, which it may spoil."""
    return Toy.build(family)


# -- the specs ---------------------------------------------------------------------------------------------------------


@every_family
def test_a_spec_names_what_exists(toy: Toy) -> None:
    for denoiser in denoisers_of(toy.pipeline):
        spec, given = spec_of(denoiser), inspect.signature(denoiser.forward).parameters
        named = (spec.sample, spec.timestep, *spec.conditioning, *spec.between_blocks, *spec.skips_blocks)
        assert set(named) <= set(given)
        blocks = spec.blocks(denoiser)
        assert len({id(block) for block in blocks}) == len(blocks) > 3
        for block, group in zip(blocks, spec.groups_of(denoiser), strict=True):
            arguments = (*group.takes, *group.returns, *(each.name for each in group.per_token))
            assert set(arguments) <= set(inspect.signature(block.forward).parameters)
            assert any(hasattr(block, name) for name in group.self_attention)
        for method in with_threshold():
            assert with_family_threshold(CacheConfig(use_cache=method), spec, denoiser).rel_l1_thresh > 0
        counted = sum(denoiser.config.get(name) or 0 for name in spec.layer_counts)
        assert counted == len(blocks) or not spec.same_tokens


@every_family
def test_blocks_run_in_the_order_of_the_spec(toy: Toy) -> None:
    denoiser, order = denoisers_of(toy.pipeline)[0], []
    blocks = spec_of(denoiser).blocks(denoiser)
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: order.append(index))
        for index, block in enumerate(blocks)
    ]
    toy.images(2)
    for hook in hooks:
        hook.remove()
    assert order[: len(blocks)] == list(range(len(blocks)))


# -- what a cache must not change --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("method", ["Tea", "Fb"])
@every_family
def test_never_hit_is_bit_identical(toy: Toy, method: str, settings: dict[str, Any]) -> None:
    expected = toy.plain_images(STEPS, batch=2)
    with attached(toy.pipeline, "pipeline", method, **settings) as engine:
        images = toy.images(STEPS, batch=2)
        summary = engine.summary()
    assert np.array_equal(images, expected)
    assert summary["hit_rate"] == summary["flops_saved"] == 0
    assert (summary["generations"], summary["steps"], summary["branches"]) == (1, STEPS, 1)
    assert all(row == [1] * summary["blocks"] for row in next(iter(summary["plan"].values())))


@pytest.mark.parametrize("settings", NEVER.values(), ids=NEVER)
@pytest.mark.parametrize("method", ["Tea", "Fb"])
def test_a_model_of_one_block(method: str, settings: dict[str, Any]) -> None:
    """Fb's probed block is then all there is."""
    pipeline = dit.build_small(layers=1)
    expected = drive(pipeline.transformer, 4)
    with attached(pipeline, "transformer", method, **settings) as engine:
        outputs = drive(pipeline.transformer, 4)
        assert engine.summary()["hit_rate"] == 0
    assert all((a == b).all() for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("method", [None, "Tea", "Fb"], ids=str)
@every_family
def test_never_hit_on_a_denoiser_alone(toy: Toy, method: str | None) -> None:
    settings = {} if method is None else {"rel_l1_thresh": 0}
    expected = toy.plain_images(STEPS, batch=2)
    with attached(toy.pipeline, "transformer", method, **settings) as engine:
        assert np.array_equal(toy.images(STEPS, batch=2), expected)
        assert engine.summary()["hit_rate"] == 0
        assert (engine.summary()["generations"], engine.summary()["branches"]) == (1, 1)


# -- what it must change, and may not keep -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", HITTING.values(), ids=HITTING)
@every_family
def test_hits_change_the_images_and_a_second_generation_is_the_first(toy: Toy, settings: dict[str, Any]) -> None:
    """Without the first, never-hit would hold for blocks that contribute nothing."""
    expected = toy.plain_images(STEPS, batch=2)
    with attached(toy.pipeline, "pipeline", **settings) as engine:
        images = toy.images(STEPS, batch=2)
        first = engine.summary()
        toy.images(STEPS - 1, seed=5)
        engine.reset()
        assert np.array_equal(toy.images(STEPS, batch=2), images)
        assert engine.summary() == first
    assert first["hit_rate"] > 0.15 and first["non_finite"] == 0
    assert np.isfinite(images).all() and np.abs(images - expected).max() > 1e-4


@every_family
def test_a_branch_alone_is_what_it_was_beside_the_other(toy: Toy) -> None:
    """The calls of the first denoiser in a guided generation, and again those of one branch only."""
    denoiser, calls = denoisers_of(toy.pipeline)[0], []
    spec, reading = spec_of(denoiser), BoundArguments(denoiser.forward)

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            calls.append((reading.named(args, kwargs), sample_of(output).clone()))
            return output

        return forward

    settings = {"use_cache": "Interval", "interval": 2}
    with attached(toy.pipeline, "transformer", **settings) as engine:
        with wrapped_again(denoiser, recording):
            toy.images(STEPS, guided=True)
        assert engine.summary()["hit_rate"] > 0
        assert engine.summary()["branches"] == (2 if spec.guidance == "calls" else 1)
    with torch.no_grad():
        for branch in range(2):
            with attached(toy.pipeline, "transformer", **settings) as engine:
                if spec.guidance == "calls":
                    own = calls[branch::2]
                    for named, output in own:
                        assert torch.equal(sample_of(denoiser(**named)), output)
                else:
                    for named, output in calls:
                        rows = part(2, 2, branch)
                        own_half = sample_of(denoiser(**narrow_batch(named, spec.per_image, 2, rows)))
                        torch.testing.assert_close(own_half, output[rows], rtol=1e-4, atol=1e-4)
                assert engine.summary()["hit_rate"] > 0


@contextmanager
def wrapped_again(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put a wrapper outside of the engine's for as long as the block lasts."""
    kept = vars(module)["forward"]
    module.forward = wrap(kept)
    module.forward.__wrapped__ = kept
    try:
        yield
    finally:
        module.forward = kept


@every_family
def test_an_interrupted_generation_leaves_nothing(toy: Toy) -> None:
    with attached(toy.pipeline, "pipeline", **SKIPPING) as engine:
        expected, plan = toy.images(STEPS), engine.summary()["plan"]

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            left.pop()
            return original(*args, **kwargs)

        return step

    left = [1, 1]
    with wrapped(toy.scheduler, "step", failing), attached(toy.pipeline, "pipeline", **SKIPPING) as engine:
        with pytest.raises(IndexError):
            toy.images(STEPS, seed=3)
        left.extend([1] * STEPS)
        assert np.array_equal(toy.images(STEPS), expected)
        assert engine.summary()["plan"] == plan


# -- taking it off -----------------------------------------------------------------------------------------------------


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """All modules but the autoencoder's, of which some count their own calls."""
    components = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    components.pop("vae")
    return {f"{name}:{path}": module for name, part in components.items() for path, module in part.named_modules()}


def snapshot(pipeline: Any) -> dict[str, dict[str, Any]]:
    """Every attribute of every module, containers (hooks, parameters, buffers) with a copy of what they hold."""
    return {
        path: {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for path, module in modules_of(pipeline).items()
    }


def assert_same(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> None:
    assert before.keys() == after.keys()
    for path, attributes in before.items():
        assert attributes.keys() == after[path].keys(), path
        for name, value in attributes.items():
            now = after[path][name]
            if isinstance(value, dict):
                assert value.keys() == now.keys(), f"{path}.{name}"
                assert all(now[key] is held for key, held in value.items()), f"{path}.{name}"
            else:
                assert now is value or (isinstance(value, (int, float, str)) and now == value), f"{path}.{name}"


@pytest.mark.parametrize(
    ("level", "settings"),
    [
        ("pipeline", {"use_cache": "Fb", "enable_adacorrection": True, "adacorr_tolerance": 0.1}),
        ("transformer", SKIPPING),
    ],
)
@every_family
def test_removing_leaves_every_attribute_as_it_was(own: Toy, level: str, settings: dict[str, Any]) -> None:
    """Also after a generation; a named context of diffusers would leave a hook registry on the denoiser."""
    own.images(2)  # schedulers, text encoders and autoencoders gain attributes with their first use
    before, keys = snapshot(own.pipeline), list(own.transformer.state_dict())
    scheduler = dict(vars(own.scheduler))
    with attached(own.pipeline, level, **settings) as engine:
        assert list(own.transformer.state_dict()) == keys
        engine.remove()
        assert_same(before, snapshot(own.pipeline))
        assert vars(own.scheduler).keys() == scheduler.keys()
        assert all(vars(own.scheduler)[name] is value for name, value in scheduler.items())
    with attached(own.pipeline, level, **settings):
        own.images(steps=3)
    assert_same(before, snapshot(own.pipeline))
    assert vars(own.scheduler).keys() == scheduler.keys()


@pytest.mark.parametrize("level", LEVELS)
@every_family
def test_images_afterwards_are_those_from_before_and_a_second_time_as_the_first(toy: Toy, level: str) -> None:
    before, images, summaries = toy.plain_images(4), [], []
    for _ in range(2):
        with attached(toy.pipeline, level, **SKIPPING) as engine:
            images.append(toy.images(4))
            summaries.append(engine.summary())
        assert np.array_equal(toy.images(4), before)
    assert np.array_equal(*images) and not np.array_equal(images[0], before)
    assert summaries[0] == summaries[1] and summaries[0]["hit_rate"] > 0


# -- other weights -----------------------------------------------------------------------------------------------------


@every_family
def test_saved_and_loaded_it_draws_the_same(toy: Toy, tmp_path: Path) -> None:
    with attached(toy.pipeline, "pipeline", **SKIPPING):
        expected = toy.images(STEPS)
        toy.pipeline.save_pretrained(tmp_path)  # with the cache on
    loaded = Toy(toy.family, type(toy.pipeline).from_pretrained(tmp_path, safety_checker=None, local_files_only=True))
    loaded.pipeline.set_progress_bar_config(disable=True)
    with attached(loaded.pipeline, "pipeline", **SKIPPING):
        # Wan's positions are in double precision until it is loaded.
        np.testing.assert_allclose(loaded.images(STEPS), expected, rtol=0, atol=1e-4)


@every_family
def test_in_bfloat16(own: Toy) -> None:
    own.pipeline.to(torch.bfloat16)
    expected = own.plain_images(STEPS)
    with attached(own.pipeline, "pipeline", "Tea", rel_l1_thresh=0):
        assert np.array_equal(own.images(STEPS), expected)
    with attached(own.pipeline, "pipeline", **SKIPPING) as engine:
        images = own.images(STEPS)
        assert engine.summary()["hit_rate"] > 0.2
    assert np.isfinite(images).all() and not np.array_equal(images, expected)


@every_family
def test_a_lora_before_attaching_and_after(own: Toy) -> None:
    def adapt() -> None:
        torch.manual_seed(5)
        for denoiser in denoisers_of(own.pipeline):
            adapter = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            inject_adapter_in_model(adapter, denoiser)

    with attached(own.pipeline, "pipeline", **SKIPPING):
        without = own.images(STEPS)
        adapt()
        after = own.images(STEPS)
    with attached(own.pipeline, "pipeline", **SKIPPING):
        assert np.array_equal(own.images(STEPS), after)
    expected = own.images(STEPS)
    with attached(own.pipeline, "pipeline", "Tea", rel_l1_thresh=0):
        assert np.array_equal(own.images(STEPS), expected)
    assert not np.array_equal(without, after)
