"""Ten disturbances between two images: both the image that is drawn under one and the image after it are those of a
freshly attached pipeline, for every method on blocks and for the trajectory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from peft import LoraConfig, inject_adapter_in_model
from toys import CALL, Toy

from xfuser import apply_cache_on_pipeline, load_pipeline

STEPS = 5
METHODS: dict[str, dict[str, Any]] = {
    "Fast": {"use_cache": "Fast", "rel_l1_thresh": 0.4},
    "Fast, moving tokens": {"use_cache": "Fast", "rel_l1_thresh": 0.4, "motion_threshold": 0.3},
    "Tea": {"use_cache": "Tea", "rel_l1_thresh": 0.3},
    "Fb": {"use_cache": "Fb", "rel_l1_thresh": 0.3},
    "Interval": {"use_cache": "Interval", "interval": 2},
    "budget": {"use_cache": "Tea", "rel_l1_thresh": 0.3, "enable_adacorrection": True, "adacorr_budget": 0.6},
    "bound": {"use_cache": "Fb", "rel_l1_thresh": 0.3, "enable_adacorrection": True, "adacorr_tolerance": 0.1},
    "gate": {"use_cache": "Fb", "rel_l1_thresh": 0.3, "enable_adacorrection": True, "adacorr_mode": "gate"},
    "blend": {"use_cache": "Tea", "rel_l1_thresh": 0.3, "enable_adacorrection": True, "adacorr_mode": "blend"},
    "trajectory": {"adacorr_budget": 0.5},
}
FAMILIES = ("dit", "tiny-dit", "flux", "pixart", "sd3")
# All of them on one toy; of the others those that remember differently, and the rest where there is time for it.
QUICK = {
    "dit": set(METHODS),
    "tiny-dit": {"Tea", "trajectory"},
    "flux": {"Fast, moving tokens", "budget", "trajectory"},
    "pixart": {"Fb"},
    "sd3": {"Fast"},
}
PAIRS = [
    pytest.param(family, method, marks=() if method in QUICK[family] else pytest.mark.slow)
    for family in FAMILIES
    for method in METHODS
]


@dataclass
class Drawn:
    """A pipeline, and how it is asked for images."""

    family: str
    pipeline: Any
    call: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(cls, family: str) -> Drawn:
        if family != "tiny-dit":
            return cls(family, Toy.build(family).pipeline)
        pipeline = load_pipeline("tiny-dit").pipeline
        pipeline.set_progress_bar_config(disable=True)
        return cls(family, pipeline)

    def image(self, seed: int = 0) -> np.ndarray:
        call = {"batch": 1, "steps": STEPS, "guided": True, "size": 64} | self.call
        torch.manual_seed(seed)
        arguments: dict[str, Any] = {
            "generator": [torch.Generator().manual_seed(seed + index) for index in range(call["batch"])],
            "num_inference_steps": call["steps"],
            "output_type": "np",
        }
        if self.family in ("dit", "tiny-dit"):
            arguments |= {"class_labels": [3] * call["batch"], "guidance_scale": 1.5 if call["guided"] else 1.0}
        else:
            arguments |= {"prompt": ["a fox"] * call["batch"], "max_sequence_length": 16}
            arguments |= {"height": call["size"], "width": call["size"], **CALL.get(self.family, {})}
            if self.family == "flux":
                arguments |= {"negative_prompt": ["a dog"] * call["batch"], "true_cfg_scale": 1 + call["guided"]}
            else:
                arguments["guidance_scale"] = 3.0 if call["guided"] else 1.0
        return np.asarray(self.pipeline(**arguments).images)


@cache
def built(family: str, place: int) -> Drawn:
    """One of two equal pipelines: one is disturbed, one is attached to afresh for every image."""
    return Drawn.build(family)


# -- the disturbances: each changes a pipeline for as long as it lasts ------------------------------------------------


@contextmanager
def assigned(drawn: Drawn, name: str, value: Any) -> Iterator[None]:
    kept = getattr(drawn.pipeline, name)
    setattr(drawn.pipeline, name, value)
    try:
        yield
    finally:
        setattr(drawn.pipeline, name, kept)


def scheduler(drawn: Drawn) -> Any:
    kept = drawn.pipeline.scheduler
    if isinstance(kept, FlowMatchEulerDiscreteScheduler):
        return assigned(drawn, "scheduler", type(kept).from_config(kept.config, shift=2.0))
    kind = DDIMScheduler if isinstance(kept, DPMSolverMultistepScheduler) else DPMSolverMultistepScheduler
    return assigned(drawn, "scheduler", kind.from_config(kept.config))


def transformer(drawn: Drawn) -> Any:
    """Of the same class, with other weights and one block less."""
    other = copy.deepcopy(built(drawn.family, 2).pipeline.transformer)
    del other.transformer_blocks[-1]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    return assigned(drawn, "transformer", other)


@contextmanager
def called(drawn: Drawn, **changes: Any) -> Iterator[None]:
    drawn.call = changes
    try:
        yield
    finally:
        drawn.call = {}


@contextmanager
def lora(drawn: Drawn) -> Iterator[None]:
    """An adapter on every query and value, taken off again by putting the modules back that it wraps."""
    model = drawn.pipeline.transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        inject_adapter_in_model(config, model)
    try:
        yield
    finally:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if hasattr(child, "base_layer"):
                    setattr(module, name, child.base_layer)


@contextmanager
def half_precision(drawn: Drawn) -> Iterator[None]:
    modules = [each for each in drawn.pipeline.components.values() if isinstance(each, torch.nn.Module)]
    tensors = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    kept = [each.detach().clone() for each in tensors]
    drawn.pipeline.to(torch.bfloat16)
    try:
        yield
    finally:
        drawn.pipeline.to(torch.float32)
        now = [each for module in modules for each in (*module.parameters(), *module.buffers())]
        for tensor, value in zip(now, kept, strict=True):
            tensor.detach().copy_(value)


@contextmanager
def exception(drawn: Drawn) -> Iterator[None]:
    """One generation breaks off in its second step."""
    left = [4 if drawn.family == "flux" else 2]

    def fail(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("in the middle")

    hook = drawn.pipeline.transformer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            drawn.image(seed=7)
    finally:
        hook.remove()
    yield


@contextmanager
def another_thread(drawn: Drawn) -> Iterator[None]:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(drawn.image, seed=7).result()
    yield


DISTURBANCES: dict[str, Callable[[Drawn], Any]] = {
    "scheduler": scheduler,
    "transformer": transformer,
    "steps": partial(called, steps=STEPS + 2),
    "size": partial(called, size=32),
    "batch": partial(called, batch=2),
    "guidance off": partial(called, guided=False),
    "LoRA": lora,
    "dtype": half_precision,
    "exception": exception,
    "another thread": another_thread,
}


LASTING = [name for name in DISTURBANCES if name not in ("exception", "another thread")]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_both_images_are_a_fresh_pipelines(family: str, method: str, tmp_path: Path) -> None:
    on_trajectory = method == "trajectory"
    used, fresh = built(family, 0), built(family, 1)
    stores = (tmp_path / "used", tmp_path / "fresh")

    def settings(store: Path) -> dict[str, Any]:
        return METHODS[method] | ({"store": store} if on_trajectory else {})

    def expected() -> np.ndarray:
        """By a fresh process, which finds what the used one has stored until now."""
        if on_trajectory:
            shutil.rmtree(stores[1], ignore_errors=True)
            shutil.copytree(stores[0], stores[1], dirs_exist_ok=True)
        engine = apply_cache_on_pipeline(fresh.pipeline, **settings(stores[1]))
        try:
            return fresh.image()
        finally:
            engine.remove()

    stores[0].mkdir()
    engine = apply_cache_on_pipeline(used.pipeline, **settings(stores[0]))
    try:
        used.image(seed=1)
        cached = expected()
        assert np.array_equal(used.image(), cached)
        assert engine.summary()["hit_rate"] > 0 or method in ("blend", "Fast", "gate", "bound")
        for name, disturb in DISTURBANCES.items():
            with disturb(used):
                if name in LASTING:
                    with disturb(fresh):
                        under = expected()
                    assert np.array_equal(used.image(), under), f"{name}: the image under it"
            assert np.array_equal(used.image(), cached), f"{name}: the image after it"
    finally:
        engine.remove()
