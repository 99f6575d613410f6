"""Toy pipelines of every family, a scripted transformer to compute by hand, and the verbs that the tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import SMALL, BlockGroup, ModelSpec, SmallPipeline, denoisers_of, spec_of
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_pipeline, apply_cache_on_transformer
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice

FAMILIES = ("dit", "flux")  # one stream and two: what most tests run on
ALL_FAMILIES = (*FAMILIES, "pixart", "sd3")
LEVELS = ("transformer", "pipeline")
ALWAYS = 1e6  # a threshold that no distance reaches


BUILDERS: dict[str, Callable[[], Any]] = {name: small.build for name, small in SMALL.items()}
CALL = {name: {"use_resolution_binning": False, "clean_caption": False} for name in ("pixart", "pixart-sigma")}


@dataclass
class Toy:
    """A pipeline and one way to ask it for images, whatever its family."""

    family: str
    pipeline: Any
    _plain: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    @classmethod
    def build(cls, family: str) -> Toy:
        pipeline = BUILDERS[family]()
        pipeline.set_progress_bar_config(disable=True)
        return cls(family, pipeline)

    @property
    def small(self) -> SmallPipeline:
        return SMALL[self.family]

    @property
    def transformer(self) -> nn.Module:
        return denoisers_of(self.pipeline)[0]

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @property
    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.transformer)

    def images(self, steps: int = 6, batch: int = 1, seed: int = 0, guided: bool = False) -> np.ndarray:
        """Generate with whatever is attached, float [batch, H, W, C], or [batch, F, H, W, C] of a video.

        Where guidance is in one batch, there is always some.
        """
        arguments: dict[str, Any] = {
            "generator": [torch.Generator().manual_seed(seed + index) for index in range(batch)],
            "num_inference_steps": steps,
            "output_type": "np",
        }
        arguments |= self.small.call(batch)
        if guided or spec_of(self.transformer).guidance == "batch":
            arguments |= self.small.guided(batch)
        return np.asarray(getattr(self.pipeline(**arguments), self.small.makes))

    def plain_images(self, steps: int = 6, batch: int = 1, seed: int = 0) -> np.ndarray:
        """The same without a cache, computed once."""
        key = (steps, batch, seed)
        if key not in self._plain:
            assert not any("forward" in vars(each) for each in denoisers_of(self.pipeline))
            self._plain[key] = self.images(*key)
        return self._plain[key]


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """Its blocks, found without the specs."""
    lists = ("transformer_blocks", "joint_transformer_blocks", "blocks", "single_transformer_blocks")
    return [block for name in lists for block in getattr(transformer, name, ())]


@contextmanager
def attached(pipeline: Any, level: str, use_cache: str | None, **settings: Any) -> Iterator[CacheEngine]:
    """A cache on the pipeline or on its transformer for as long as the block lasts."""
    if level == "pipeline":
        engine = apply_cache_on_pipeline(pipeline, use_cache, **settings)
    else:
        engine = apply_cache_on_transformer(denoisers_of(pipeline)[0], use_cache, **settings)
    try:
        yield engine
    finally:
        engine.remove()


@contextmanager
def wrapped(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a method on one instance. Enter it before `attached`, so that the engine comes off first."""
    assert name not in vars(owner)
    setattr(owner, name, functools.wraps(getattr(owner, name))(wrap(getattr(owner, name))))
    try:
        yield
    finally:
        delattr(owner, name)


@contextmanager
def counted(toy: Toy) -> Iterator[list[int]]:
    """How often each block's own forward runs."""
    counts = [0] * len(toy.blocks)

    def counting(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                counts[index] += 1
                return original(*args, **kwargs)

            return forward

        return wrap

    with ExitStack() as stack:
        for index, block in enumerate(toy.blocks):
            stack.enter_context(wrapped(block, "forward", counting(index)))
        yield counts


@torch.no_grad()
def drive(transformer: nn.Module, steps: int, drift: float = 0.03, seed: int = 0) -> list[torch.Tensor]:
    """Call a DiT or Flux transformer as a sampler would, its input moving by ``drift`` a step; returns the outputs."""
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    if type(transformer).__name__ == "DiTTransformer2DModel":
        base, direction = torch.randn(2, 2, 4, 4, 4, generator=generator)
        labels = torch.tensor([3, 1000])
        for step in range(steps):
            timestep = torch.full((2,), 1000 - (step + 1) * 900 // steps)
            sample = base + drift * step * direction
            outputs.append(transformer(sample, timestep=timestep, class_labels=labels).sample)
        return outputs
    base, direction = torch.randn(2, 1, 16, 16, generator=generator)
    text, pooled = torch.randn(1, 6, 32, generator=generator), torch.randn(1, 32, generator=generator)
    positions = torch.stack((torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4), dim=1)
    for step in range(steps):
        outputs.append(
            transformer(
                hidden_states=base + drift * step * direction,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=torch.tensor([1 - 0.9 * step / steps]),
                img_ids=positions,
                txt_ids=torch.zeros(6, 3),
            ).sample
        )
    return outputs


class ScriptedBlock(nn.Module):
    """Adds a number that depends on the step alone to every token; counts its evaluations."""

    def __init__(self, residual: Callable[[int], float]) -> None:
        super().__init__()
        self.residual = residual
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return hidden_states + self.residual(1000 - int(timestep))


class ScriptedTransformer(nn.Module):
    def __init__(self, *residuals: Callable[[int], float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ScriptedBlock(residual) for residual in residuals)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep=timestep)
        return hidden_states

    def run(self, values: list[float]) -> list[float]:
        """One generation, the sample of each step filled with one value; returns the (uniform) outputs."""
        outputs = []
        for step, value in enumerate(values):
            output = self(torch.full((1, 8, 4), value), timestep=torch.tensor(1000 - step))
            assert torch.equal(output, output.flatten()[0].expand_as(output))
            outputs.append(float(output.flatten()[0]))
        return outputs


def growing_values(factors: list[float]) -> list[float]:
    """1, and every next value its predecessor times a factor: the rel-L1 of a step is |factor - 1|."""
    values = [1.0]
    for factor in factors:
        values.append(values[-1] * factor)
    return values


SCRIPTED = ModelSpec(
    transformer_class="ScriptedTransformer",
    groups=(BlockGroup("blocks"),),
    conditioning=(),
    modulated_input=lambda block, arguments: arguments["hidden_states"],
)


def scripted_engine(transformer: ScriptedTransformer, **settings: Any) -> CacheEngine:
    """An engine whose TeaCache compares the samples themselves."""
    return CacheEngine(transformer, SCRIPTED, CacheConfig.from_keywords(**settings))


@contextmanager
def choosing(choose: Callable[[torch.Tensor], TokenChoice | None]) -> Iterator[None]:
    """Fast's choice of tokens, from the first block's input alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenChoice, "moving", lambda current, previous, threshold, text=0: choose(current))
        yield
