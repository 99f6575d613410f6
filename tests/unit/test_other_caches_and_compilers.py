"""On one transformer: a compiler, which works beneath the decisions, and diffusers' own caches, which are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache
from torch._dynamo.utils import counters
from toys import LEVELS, Toy, attached

from xfuser import apply_cache_on_pipeline, apply_cache_on_transformer

STEPS = 6
TEA: dict[str, Any] = {"use_cache": "Tea", "rel_l1_thresh": 0.5}


@pytest.fixture
def own() -> Iterator[Toy]:
    torch._dynamo.reset()
    counters.clear()
    yield Toy.build("flux")
    torch._dynamo.reset()


def attach(toy: Toy, level: str) -> Any:
    if level == "trajectory":
        return apply_cache_on_pipeline(toy.pipeline, adacorr_budget=0.5, calibration="first")
    if level == "pipeline":
        return apply_cache_on_pipeline(toy.pipeline, **TEA)
    return apply_cache_on_transformer(toy.transformer, **TEA)


# -- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["compiler", "cache"])
def test_compiled_blocks_with_full_graphs(own: Toy, first: str) -> None:
    """The way that diffusers recommends, before or after attaching: no graph contains a decision, and none breaks."""
    with attached(own.pipeline, "pipeline", **TEA) as engine:
        expected, hit_rate = own.images(STEPS), engine.summary()["hit_rate"]
    if first == "compiler":
        own.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        own.images(2)
        assert counters["stats"]["unique_graphs"] == 3  # dual, single, and a single block with a length of its own
    with attached(own.pipeline, "pipeline", **TEA) as engine:
        if first == "cache":
            own.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        for _ in range(2):
            assert np.allclose(own.images(STEPS), expected, atol=1e-4)
        assert engine.summary()["hit_rate"] == hit_rate > 0.1
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 3 and not counters["graph_break"]
    assert all(block._compiled_call_impl is not None for block in own.blocks), "what the user compiled stays compiled"
    assert not any({"forward", "compile"} & set(vars(block)) for block in own.blocks)
    own.images(STEPS)
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


def test_a_compiled_block_keeps_what_it_is_asked_for(own: Toy) -> None:
    block = own.blocks[0]
    with attached(own.pipeline, "pipeline", **TEA):
        block.compile(backend="eager")
    assert block._compiled_call_impl is not None
    with attached(own.pipeline, "pipeline", **TEA):
        assert block._compiled_call_impl is None
    assert block._compiled_call_impl is not None


def test_blocks_that_have_no_full_graph(own: Toy) -> None:
    with attached(own.pipeline, "pipeline", "Fast", motion_threshold=0.2):
        with pytest.raises(ValueError, match="fullgraph"):
            own.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    own.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="attach the cache first"):
        apply_cache_on_pipeline(own.pipeline, "Fast", motion_threshold=0.2)
    assert not any({"forward", "compile"} & set(vars(module)) for module in own.transformer.modules())
    assert all(block._compiled_call_impl is not None for block in own.blocks)
    with attached(own.pipeline, "pipeline", **TEA):
        own.images(2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("how", ["torch.compile", "compile()"])
def test_a_transformer_that_is_compiled_whole(own: Toy, how: str, level: str) -> None:
    """On blocks it is refused with the way that works; the trajectory takes it as it is."""
    before = own.transformer
    if how == "compile()":
        before.compile(backend="eager")
    else:
        own.pipeline.transformer = torch.compile(before, backend="eager")
    with pytest.raises(ValueError, match=r"compile_repeated_blocks\(fullgraph=True\)") as refusal:
        attach(own, level)
    assert "\n" not in str(refusal.value)
    assert not any({"forward", "compile"} & set(vars(module)) for module in before.modules())
    attach(own, "trajectory").remove()


def test_compiling_it_whole_afterwards(own: Toy) -> None:
    with attached(own.pipeline, "pipeline", **TEA) as engine:
        with pytest.raises(ValueError, match="compile the blocks instead"):
            own.transformer.compile(fullgraph=True)
        kept = own.transformer
        own.pipeline.transformer = torch.compile(kept, backend="eager")
        with pytest.raises(ValueError, match="compile the blocks instead"):
            own.images(2)
        own.pipeline.transformer = kept
        own.images(STEPS)
        assert engine.summary()["hit_rate"] > 0


# -- diffusers' own caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [*LEVELS, "trajectory"])
def test_diffusers_cache_first(own: Toy, level: str) -> None:
    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"FirstBlockCache is switched on.*disable_cache\(\)") as refusal:
        attach(own, level)
    assert "\n" not in str(refusal.value)
    own.transformer.disable_cache()
    attach(own, level).remove()


@pytest.mark.parametrize("level", [*LEVELS, "trajectory"])
def test_diffusers_cache_second(own: Toy, level: str) -> None:
    engine = attach(own, level)
    try:
        with pytest.raises(ValueError, match=r"remove\(\)") as refusal:
            own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        assert "\n" not in str(refusal.value)
        assert not own.transformer.is_cache_enabled
    finally:
        engine.remove()
    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert own.transformer.is_cache_enabled


def test_diffusers_cache_by_its_function(own: Toy) -> None:
    apply_first_block_cache(own.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="first_block_cache is switched on"):
        attach(own, "pipeline")
