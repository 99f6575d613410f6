"""What is particular to PixArt and Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import ALWAYS, BUILDERS, CALL, LEVELS, Toy, attached, counted, wrapped

from xfuser.model_executor.adapters import TYPES, spec_of
from xfuser.model_executor.cache import apply_cache_on_transformer
from xfuser.model_executor.cache.policies.tea import TeaState
from xfuser.model_executor.pipelines import load_pipeline
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit

NEW = ("pixart", "pixart-sigma", "sd3")
STEPS = 8
RUNS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "Tea": ("Tea", {"rel_l1_thresh": 0.08}),
    "Fb": ("Fb", {"rel_l1_thresh": 0.15}),
    "budget": ("Tea", {"enable_adacorrection": True, "adacorr_budget": 0.5}),
    "bound": ("Fb", {"enable_adacorrection": True, "adacorr_tolerance": 0.1}),
    "blend": ("Tea", {"enable_adacorrection": True, "adacorr_mode": "blend", "adacorr_score": "relative"}),
}


@torch.no_grad()
def drive_sd3(transformer: torch.nn.Module, steps: int, **extra: Any) -> list[torch.Tensor]:
    """Call the transformer as a sampler would, its input moving a little with every step."""
    generator = torch.Generator().manual_seed(0)
    base, direction = torch.randn(2, 1, 4, 8, 8, generator=generator)
    text, pooled = torch.randn(1, 6, 64, generator=generator), torch.randn(1, 64, generator=generator)
    return [
        transformer(
            hidden_states=base + 0.03 * step * direction,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([1000 - 900 * step / steps]),
            **extra,
        ).sample
        for step in range(steps)
    ]


# -- the new ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", NEW)
def test_the_hit_rate_is_what_was_not_evaluated(toy: Toy, run: str) -> None:
    method, settings = RUNS[run]
    expected = toy.plain_images(STEPS)
    with counted(toy) as counts, attached(toy.pipeline, "pipeline", method, **settings) as engine:
        images = toy.images(STEPS)
        summary = engine.summary()
    assert summary["hit_rate"] == pytest.approx(1 - sum(counts) / (STEPS * len(counts)), abs=1e-12)
    assert (summary["hit_rate"] > 0.1) == (run != "blend")
    assert summary["non_finite"] == 0
    assert 0 < np.abs(images - expected).mean() < 0.05
    if run == "blend":
        (weights,) = summary["weights"].values()
        assert all(0 < row[0] < 1 for row in weights[1:])


@pytest.mark.parametrize("family", NEW)
def test_tea_compares_what_attention_gets(toy: Toy) -> None:
    first, signals, seen = toy.blocks[0], [], []
    attention = first.attn if toy.family == "sd3" else first.attn1

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    with ExitStack() as stack:
        stack.callback(attention.register_forward_pre_hook(note, with_kwargs=True).remove)
        engine = stack.enter_context(attached(toy.pipeline, "pipeline", "Tea", rel_l1_thresh=0))
        original = engine.policy.measure

        def measure(state: TeaState, *args: Any) -> torch.Tensor:
            sums = original(state, *args)
            signals.append(state.modulated)
            return sums

        engine.policy.measure = measure
        toy.images(3, batch=2)
    assert len(seen) == 3
    for modulated, expected in zip(signals, seen, strict=True):
        torch.testing.assert_close(modulated, expected)


@pytest.mark.parametrize(("prompt", "generations"), [("a boat", 2), ("a fox", 1)])
@pytest.mark.parametrize("family", ["pixart-sigma", "sd3"])
def test_a_generation_from_the_same_noise_is_told_by_its_text(toy: Toy, prompt: str, generations: int) -> None:
    """A generation of one step, then a longer one: to a transformer alone they differ in nothing else."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def ask(prompt: str, steps: int) -> None:
        size = {"height": 64, "width": 64, "max_sequence_length": 16, "output_type": "latent"}
        options = size | CALL.get(toy.family, {})
        toy.pipeline(prompt, latents=latents, num_inference_steps=steps, guidance_scale=1.0, **options)

    with attached(toy.pipeline, "transformer", "Tea", rel_l1_thresh=ALWAYS) as engine:
        ask("a fox", 1)
        ask(prompt, 4)
        assert engine.summary()["generations"] == generations


@pytest.mark.parametrize("method", ["Tea", "Fb"])
@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_the_default_threshold_skips_about_half_of_the_toy(family: str, method: str) -> None:
    loaded = load_pipeline(family)
    engine = apply_cache_on_transformer(
        loaded.pipeline.transformer, method, rel_l1_thresh=loaded.spec.thresholds[method]
    )
    images = loaded.generate(["a red fox asleep in the snow"], [42], 20)
    assert images.shape == (1, 64, 64, 3) and images.std() > 0.05
    assert 0.4 < engine.summary()["hit_rate"] < 0.6


# -- Stable Diffusion 3 ------------------------------------------------------------------------------------------------


@contextmanager
def replayed(toy: Toy) -> Iterator[None]:
    """A cache by hand: every block adds again what it added at the first step, the last one to the image alone."""
    residuals: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def replaying(index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
                if index not in residuals:
                    text, image = original(hidden_states, encoder_hidden_states, **kwargs)
                    residuals[index] = (None if text is None else text - encoder_hidden_states, image - hidden_states)
                text, image = residuals[index]
                return None if text is None else encoder_hidden_states + text, hidden_states + image

            return forward

        return wrap

    with ExitStack() as stack:
        for index, block in enumerate(toy.blocks):
            stack.enter_context(wrapped(block, "forward", replaying(index)))
        yield


@pytest.mark.parametrize("controlled", [False, True])
def test_what_stands_in_for_blocks_of_which_the_last_returns_no_text(sd3: Toy, controlled: bool) -> None:
    """A ControlNet adds to the image after every block but the last, the same whether the block ran or not."""
    assert [block.context_pre_only for block in sd3.blocks] == [False] * 7 + [True]
    extra = {}
    if controlled:
        generator = torch.Generator().manual_seed(3)
        extra["block_controlnet_hidden_states"] = list(0.3 * torch.randn(4, 1, 16, 64, generator=generator))
    with replayed(sd3):
        expected = drive_sd3(sd3.transformer, 3, **extra)
    with attached(sd3.pipeline, "transformer", "Tea", rel_l1_thresh=ALWAYS) as engine:
        outputs = drive_sd3(sd3.transformer, 3, **extra)
        assert [row[0] for row in engine.summary()["plan"]["0"]] == [1, 0, 0]
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


SKIPPED = [0, 3, 7]


def guided_by_skipping(sd3: Toy) -> np.ndarray:
    arguments = {"height": 64, "width": 64, "max_sequence_length": 16, "output_type": "np"}
    return sd3.pipeline(
        "a fox",
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=STEPS,
        skip_guidance_layers=SKIPPED,
        skip_layer_guidance_stop=0.7,
        **arguments,
    ).images


@pytest.mark.parametrize("mode", [{}, {"enable_adacorrection": True}, RUNS["bound"][1], RUNS["blend"][1]])
@pytest.mark.parametrize("level", LEVELS)
def test_skip_layer_guidance_goes_past_the_cache(sd3: Toy, level: str, mode: dict[str, Any]) -> None:
    """Its calls leave blocks out. They evaluate the others, and are no steps or branches of what is cached."""
    with counted(sd3) as plain:
        expected = guided_by_skipping(sd3)
    skipping_calls = plain[1] - STEPS
    assert skipping_calls == 5
    with attached(sd3.pipeline, level, "Tea", rel_l1_thresh=0) as engine:
        assert np.array_equal(guided_by_skipping(sd3), expected)
    with counted(sd3) as counts, attached(sd3.pipeline, level, "Tea", rel_l1_thresh=ALWAYS, **mode) as engine:
        guided_by_skipping(sd3)
        summary = engine.summary()
    assert (summary["calls"], summary["steps"], summary["branches"], summary["generations"]) == (STEPS, STEPS, 1, 1)
    assert sum(counts) - skipping_calls * (len(counts) - len(SKIPPED)) == summary["evaluated"]


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NEW)
def test_a_saved_pipeline_is_loaded_by_the_class_it_names(toy: Toy, tmp_path: Path) -> None:
    toy.pipeline.save_pretrained(tmp_path)
    model_type = toy.family.removesuffix("-sigma")
    loaded = load_pipeline(model_type, str(tmp_path))
    assert type(loaded.pipeline) is type(toy.pipeline)
    assert loaded.name == str(tmp_path)
    ours, theirs = loaded.pipeline.transformer.state_dict(), toy.transformer.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_class_name_that_published_checkpoints_of_alpha_have(tmp_path: Path) -> None:
    """diffusers turns it into PixArt's own class."""
    BUILDERS["pixart"]().save_pretrained(tmp_path)
    for name in ("model_index.json", "transformer/config.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    transformer = load_pipeline("pixart", str(tmp_path)).pipeline.transformer
    assert spec_of(transformer).transformer_class == "PixArtTransformer2DModel"


def test_a_pipeline_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="PixArtAlphaPipeline or PixArtSigmaPipeline.*DiTPipeline"):
        load_pipeline("pixart", str(shipped_tiny_dit()))


def test_every_prompt_model_has_a_toy() -> None:
    for name, spec in TYPES.items():
        assert (spec.toy is not None) == (spec.conditioned_on == "prompt"), name
    with pytest.raises(ValueError, match="no toy model"):
        load_pipeline("dit", "toy")
