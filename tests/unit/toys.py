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
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import ModelDeclaration
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_pipeline, apply_cache_on_transformer
from xfuser.model_executor.cache.tokens import TokenChoice
from xfuser.model_executor.pipelines.toy_flux import build_toy_flux
from xfuser.model_executor.pipelines.toy_pixart import build_toy_pixart
from xfuser.model_executor.pipelines.toy_sd3 import build_toy_sd3

FAMILIES = ("dit", "flux")  # one stream and two: what most tests run on
ALL_FAMILIES = (*FAMILIES, "pixart", "sd3")
LEVELS = ("transformer", "pipeline")
ALWAYS = 1e6  # a threshold that no distance reaches


def build_toy_dit(seed: int = 0, layers: int = 4) -> DiTPipeline:
    """A class-conditional DiT of 16 tokens and 16 channels; its images have 4 x 4 pixels of one channel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=4,
            patch_size=1,
            num_embeds_ada_norm=1000,
        )
        autoencoder = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    pipeline = DiTPipeline(transformer.eval(), autoencoder.eval(), DDIMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


BUILDERS: dict[str, Callable[[], Any]] = {
    "dit": build_toy_dit,
    "flux": build_toy_flux,
    "pixart": build_toy_pixart,
    "pixart-sigma": functools.partial(build_toy_pixart, sigma=True),
    "sd3": build_toy_sd3,
}
CALL = {
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "pixart-sigma": {"use_resolution_binning": False, "clean_caption": False},
}


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
    def transformer(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @property
    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.transformer)

    def images(self, steps: int = 6, batch: int = 1, seed: int = 0) -> np.ndarray:
        """Generate with whatever is attached, float [batch, H, W, C]."""
        arguments: dict[str, Any] = {
            "generator": [torch.Generator().manual_seed(seed + index) for index in range(batch)],
            "num_inference_steps": steps,
            "output_type": "np",
        }
        if self.family == "dit":
            arguments |= {"class_labels": [7 + index for index in range(batch)], "guidance_scale": 1.5}
        else:
            prompts = [f"fox number {index}" for index in range(batch)]
            arguments |= {"prompt": prompts, "height": 64, "width": 64, "max_sequence_length": 16}
            arguments |= CALL.get(self.family, {})
        return np.asarray(self.pipeline(**arguments).images)

    def plain_images(self, steps: int = 6, batch: int = 1, seed: int = 0) -> np.ndarray:
        """The same without a cache, computed once."""
        key = (steps, batch, seed)
        if key not in self._plain:
            assert "forward" not in vars(self.transformer)
            self._plain[key] = self.images(*key)
        return self._plain[key]


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]


@contextmanager
def attached(pipeline: Any, level: str, use_cache: str | None, **settings: Any) -> Iterator[CacheEngine]:
    """A cache on the pipeline or on its transformer for as long as the block lasts."""
    if level == "pipeline":
        engine = apply_cache_on_pipeline(pipeline, use_cache, **settings)
    else:
        engine = apply_cache_on_transformer(pipeline.transformer, use_cache, **settings)
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


SCRIPTED = ModelDeclaration(
    transformer_class="ScriptedTransformer",
    block_lists=("blocks",),
    conditioning=(),
    streams=("hidden_states",),
    returns=("hidden_states",),
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
