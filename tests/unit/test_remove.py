"""Taking a cache off leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn
from toys import ALL_FAMILIES, ALWAYS, LEVELS, Toy, attached, build_toy_dit

from xfuser.model_executor.cache import apply_cache_on_pipeline, apply_cache_on_transformer

SETTINGS = ({"use_cache": "Tea"}, {"use_cache": "Fb", "enable_adacorrection": True, "adacorr_tolerance": 0.1})


@pytest.fixture
def own(family: str) -> Toy:
    """A pipeline that nothing has run on yet, not even without a cache."""
    toy = Toy.build(family)
    # A scheduler gains attributes with its first schedule, and a text encoder that is asked for its hidden states hooks
    # with its first prompt; that is not the cache's doing.
    toy.scheduler.set_timesteps(4)
    if family == "sd3":
        toy.pipeline.encode_prompt("a", "a", "a")
    return toy


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    components = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
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


def hooks_of(pipeline: Any) -> list[Any]:
    return [
        hook
        for module in modules_of(pipeline).values()
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in table.values()
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=("Tea", "Fb+bound"))
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_attribute_is_what_it_was(own: Toy, level: str, settings: dict[str, Any]) -> None:
    """Also after a generation; Flux's cache_context would leave a hook registry on the transformer."""
    before, keys = snapshot(own.pipeline), list(own.transformer.state_dict())
    scheduler_before, hooks_before = dict(vars(own.scheduler)), hooks_of(own.pipeline)
    with attached(own.pipeline, level, **settings) as engine:
        assert list(own.transformer.state_dict()) == keys
        engine.remove()
        assert_same(before, snapshot(own.pipeline))
        assert vars(own.scheduler).keys() == scheduler_before.keys()
        assert all(vars(own.scheduler)[name] is value for name, value in scheduler_before.items())
    with attached(own.pipeline, level, **settings):
        own.images(steps=4)
    assert_same(before, snapshot(own.pipeline))
    assert list(own.transformer.state_dict()) == keys
    assert hooks_of(own.pipeline) == hooks_before
    assert vars(own.scheduler).keys() == scheduler_before.keys()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_images_afterwards_are_those_from_before(toy: Toy, level: str) -> None:
    before = toy.plain_images(4)
    with attached(toy.pipeline, level, "Tea", rel_l1_thresh=ALWAYS):
        assert not np.array_equal(toy.images(4), before)
    assert np.array_equal(toy.images(4), before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_applying_again_after_removal(toy: Toy, level: str) -> None:
    images, summaries = [], []
    for _ in range(2):
        with attached(toy.pipeline, level, "Tea", rel_l1_thresh=ALWAYS) as engine:
            images.append(toy.images(4))
            summaries.append(engine.summary())
    assert np.array_equal(*images)
    assert summaries[0] == summaries[1]
    assert summaries[0]["hit_rate"] > 0


@pytest.mark.parametrize("second", LEVELS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_second_application_is_refused_and_harms_nothing(dit: Toy, level: str, second: str) -> None:
    with attached(dit.pipeline, level, "Tea", rel_l1_thresh=ALWAYS) as engine:
        expected, plan = dit.images(4), engine.summary()["plan"]
    with attached(dit.pipeline, level, "Tea", rel_l1_thresh=ALWAYS) as engine:
        with pytest.raises(ValueError, match="remove"):
            if second == "pipeline":
                apply_cache_on_pipeline(dit.pipeline, "Fb")
            else:
                apply_cache_on_transformer(dit.transformer, "Fb")
        assert np.array_equal(dit.images(4), expected)
        assert engine.summary()["plan"] == plan


def test_a_scheduler_that_two_pipelines_share(dit: Toy) -> None:
    other = build_toy_dit(seed=1)
    other.scheduler = dit.scheduler
    with attached(dit.pipeline, "pipeline", "Tea"):
        with pytest.raises(ValueError, match="scheduler"):
            apply_cache_on_pipeline(other, "Tea")
        assert "forward" not in vars(other.transformer)


def test_removing_twice_is_harmless(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", "Fb") as engine:
        engine.remove()
        engine.remove()
