"""LazyDiT: its gates by hand, how they are learned, and that a block goes on from what its modules gave last."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import ALL_FAMILIES, SCRIPTED, Toy, attached, wrapped

from xfuser.cli import main
from xfuser.config import CacheConfig, ParallelConfig
from xfuser.model_executor.adapters import BlockGroup
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_pipeline
from xfuser.model_executor.cache.calibration.store import Calibration
from xfuser.model_executor.cache.policies.lazy_training import fit_gates, needed_evaluations
from xfuser.model_executor.parallel import check_combination

STEPS = 8

# -- by hand -------------------------------------------------------------------------------------------------------


class Adding(nn.Module):
    """Gives a number that the step alone says, and counts how often it runs."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size, self.step, self.calls = size, 0, 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full_like(hidden_states, self.size * (self.step + 1))


class Block(nn.Module):
    """Doubles what its attention gives: a gate of its own, which a kept output goes through too."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Adding(1.0), Adding(100.0)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + 2 * self.attn(hidden_states)
        return hidden_states + self.ff(hidden_states)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for module in self.modules():
            if isinstance(module, Adding):
                module.step = 1000 - int(timestep)
        return self.blocks[0](hidden_states, timestep=timestep)


GATED = dataclasses.replace(SCRIPTED, groups=(BlockGroup("blocks", self_attention=("attn",)),))


def gates(**weights: list[float]) -> Calibration:
    """Per module, one weight a step, for each of the 4 channels alike."""
    section = {f"0.{name}": torch.tensor(steps)[:, None].expand(-1, 4).clone() for name, steps in weights.items()}
    steps = len(next(iter(weights.values())))
    return Calibration(torch.ones(3, steps, steps), torch.ones(3, steps), {"Lazy": section}, {})


def run(calibration: Calibration, **settings: Any) -> tuple[list[float], Transformer, dict[str, Any]]:
    """Outputs of every step for a sample of ones, the transformer, and the summary."""
    transformer, steps = Transformer(), calibration.steps
    config = CacheConfig(use_cache="Lazy", calibration="unread", num_steps=steps, approximation="residual", **settings)
    engine = CacheEngine(transformer, GATED, config, calibration=calibration)
    outputs = []
    for step in range(steps):
        output = transformer(torch.ones(1, 8, 4), timestep=torch.tensor(1000 - step))
        assert torch.equal(output, output.flatten()[0].expand_as(output))
        outputs.append(float(output.flatten()[0]))
    summary = engine.summary()
    engine.remove()
    return outputs, transformer, summary


def test_a_closed_gate_takes_what_the_module_gave_last() -> None:
    """The attention sees ones, so its gate is σ(4w); the MLP is open throughout."""
    outputs, transformer, summary = run(gates(attn=[-1.0, -1.0, 0.0, 1.0, -1.0], ff=[1.0] * 5))
    # Computed at step 0 (there is nothing to take), at 2 (a score of exactly .5), and at 3; else as it was last.
    attention = [1.0, 1.0, 3.0, 4.0, 4.0]
    assert outputs == [1 + 2 * each + 100 * (step + 1) for step, each in enumerate(attention)]
    assert (transformer.blocks[0].attn.calls, transformer.blocks[0].ff.calls) == (3, 5)
    assert summary["steps"] == 5 and summary["calibrated"] is True


@pytest.mark.parametrize(
    ("threshold", "calls"),
    [(0.0, 4), (1.0, 1), (1 / (1 + math.exp(-2)) - 1e-3, 4), (1 / (1 + math.exp(-2)) + 1e-3, 1)],
)
def test_the_threshold_is_compared_with_the_score(threshold: float, calls: int) -> None:
    """w·z = 4 · .5 = 2, whose σ is .881."""
    _, transformer, _ = run(gates(attn=[0.5] * 4, ff=[9.0] * 4), lazy_threshold=threshold)
    assert transformer.blocks[0].attn.calls == calls


def test_the_proposal_under_a_correction_is_the_share_of_open_gates() -> None:
    """Nothing is left out within a block then: whole blocks are decided."""
    known = gates(attn=[-1.0] * 6, ff=[1.0] * 6)
    _, transformer, summary = run(known, enable_adacorrection=True, adacorr_budget=1.0)
    assert transformer.blocks[0].attn.calls == transformer.blocks[0].ff.calls == 6
    # The first step has nothing to judge by; then one of two.
    assert summary["proposed_share"] == pytest.approx((1 + 5 * 0.5) / 6)


# -- learning ------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_needed_where_the_output_has_drifted_since_the_last() -> None:
    """One module goes 1 a step, the other .1: with 5 of 12 left out, the first computes at every step."""
    outputs = torch.arange(6.0)
    slow = (outputs[:, None] - outputs[None]).abs()[..., None] / 10
    needed = needed_evaluations({"fast": slow * 10, "slow": slow}, 0.41)
    assert needed["fast"].flatten().tolist() == [1, 1, 1, 1, 1, 1]
    assert needed["slow"].flatten().tolist() == [1, 0, 0, 0, 0, 0]
    every = needed_evaluations({"fast": slow * 10, "slow": slow}, 0)
    assert all(bool(each.all()) for each in every.values())
    # Drift adds up since the last evaluation: at a third of the steps, every third.
    thirds = needed_evaluations({"slow": slow}, 0.6)
    assert thirds["slow"].flatten().tolist() == [1, 0, 0, 1, 0, 0]


def test_the_regression_tells_the_inputs_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 5, generator=generator)
    inputs = torch.randn(3, 200, 5, generator=generator) * torch.tensor([1.0, 1.0, 10.0, 1.0, 1.0])
    needed = (torch.einsum("snd,sd->sn", inputs, truth) > 0).float()
    weights = fit_gates(inputs, needed)
    said = torch.einsum("snd,sd->sn", inputs, weights) > 0
    assert float((said == (needed > 0)).float().mean()) > 0.95
    # Where all are of one kind, so is what is said of them, and the weights stay small.
    shifted = inputs + 3
    for kind in (0.0, 1.0):
        weights = fit_gates(shifted, torch.full((3, 200), kind))
        assert bool(((torch.einsum("snd,sd->sn", shifted, weights) > 0) == bool(kind)).float().mean() > 0.9)
        assert float(weights.abs().max()) < 10


def learned(toy: Toy, **settings: Any) -> Calibration:
    with attached(toy.pipeline, "pipeline", None) as engine:
        engine.record(**settings)
        toy.images(STEPS, batch=2)
        return engine.recorded()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_attention_and_mlp_has_a_gate(toy: Toy) -> None:
    before = toy.plain_images(STEPS, 2)
    section = learned(toy).sections["Lazy"]
    declared = [
        f"{index}.{name}"
        for index, block in enumerate(toy.blocks)
        for name in ("attn1", "attn", "attn2", "ff", "ff_context", "proj_mlp")
        if getattr(block, name, None) is not None and not (toy.family == "pixart" and name == "attn2")
    ]
    assert sorted(section) == sorted(declared) and len(section) >= 2 * len(toy.blocks)
    assert all(each.shape[0] == STEPS and bool(torch.isfinite(each).all()) for each in section.values())
    assert np.array_equal(toy.images(STEPS, 2), before)


@contextmanager
def modules_counted(toy: Toy) -> Iterator[list[int]]:
    """How often attentions and MLPs run."""
    counts = [0]

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            counts[0] += 1
            return original(*args, **kwargs)

        return forward

    block = toy.blocks[0]
    name = "attn1" if hasattr(block, "attn1") else "attn"
    with wrapped(getattr(block, name), "forward", counting), wrapped(block.ff, "forward", counting):
        yield counts


@pytest.mark.parametrize("fit", ["logistic", "published"])
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_what_was_learned_serves(toy: Toy, fit: str, tmp_path: Path) -> None:
    """A file of it skips modules and not blocks; the second generation is the first, and nothing is left behind."""
    settings = {"logistic": {"lazy_ratio": 0.4}, "published": {"lazy_updates": 12, "lazy_penalty": 1.0}}[fit]
    calibration = learned(toy, lazy_fit=fit, **settings)
    assert all(weight.requires_grad for weight in toy.transformer.parameters())
    path = tmp_path / "lazy.safetensors"
    calibration.save(path)
    with modules_counted(toy) as counts, attached(toy.pipeline, "pipeline", "Lazy", calibration=path) as engine:
        first, second = toy.images(STEPS), toy.images(STEPS)
        summary = engine.summary()
    assert np.array_equal(first, second) and not np.array_equal(first, toy.plain_images(STEPS))
    # A module that is always kept leaves a block's norms and gates to run.
    assert 0.1 < summary["hit_rate"] < 1 and summary["flops_saved"] == pytest.approx(summary["hit_rate"], abs=0.3)
    assert counts[0] < 2 * 2 * STEPS
    if fit == "published":
        assert summary["hit_rate"] > 0.4, "a penalty of 1 closes the gates"
    with attached(toy.pipeline, "pipeline", "Lazy", calibration=path, lazy_threshold=0.0) as engine:
        assert np.array_equal(toy.images(STEPS), second) is False
        assert engine.summary()["hit_rate"] == 0
    assert np.array_equal(toy.images(STEPS), toy.plain_images(STEPS))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_threshold_of_0_never_hits(toy: Toy) -> None:
    """And so changes no bit; the first generation, from which it learns, changes none either."""
    plain = toy.plain_images(STEPS)
    with attached(toy.pipeline, "pipeline", "Lazy", calibration="first", lazy_threshold=0.0) as engine:
        assert np.array_equal(toy.images(STEPS), plain) and np.array_equal(toy.images(STEPS), plain)
        assert engine.summary()["hit_rate"] == 0


@pytest.mark.parametrize("mode", ["budget", "bound"])
def test_corrected(dit: Toy, mode: str) -> None:
    settings = {"enable_adacorrection": True, "adacorr_mode": mode, "calibration": "first"}
    settings |= {"adacorr_tolerance": 0.3} if mode == "bound" else {}
    with attached(dit.pipeline, "pipeline", "Lazy", **settings) as engine:
        dit.images(STEPS)
        engine.summary()
        first, second = dit.images(STEPS), dit.images(STEPS)
        assert np.array_equal(first, second)
        assert engine.summary()["hit_rate"] > 0.1 and engine.summary()["proposed_share"] < 1
    assert not np.array_equal(first, dit.plain_images(STEPS))


def test_a_kept_output_that_breaks_is_never_used(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", "Lazy", calibration="first", lazy_threshold=1.0) as engine:
        dit.images(STEPS)

        def spoiling(original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                for branch in engine._branches.values():
                    for tensor in branch.others():
                        tensor.view(-1)[0] = math.nan
                return original(*args, **kwargs)

            return step

        original = dit.scheduler.step
        dit.scheduler.step = spoiling(original)
        try:
            images = dit.images(STEPS)
        finally:
            dit.scheduler.step = original
        assert np.isfinite(images).all() and engine.summary()["non_finite"] > 0


# -- refusals ------------------------------------------------------------------------------------------------------


def test_it_needs_gates(dit: Toy, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="^use_cache='Lazy' needs calibration: a file from `xdit calibrate`, or 'first'"
    ):
        apply_cache_on_pipeline(dit.pipeline, "Lazy")
    calibration = learned(dit)
    path = tmp_path / "none.safetensors"
    dataclasses.replace(calibration, sections={}).save(path)
    with pytest.raises(ValueError, match="^calibration='.*' has nothing for use_cache='Lazy'; run `xdit calibrate`"):
        apply_cache_on_pipeline(dit.pipeline, "Lazy", calibration=path)
    assert "forward" not in vars(dit.transformer)


def test_ranks_that_share_an_image_decide_no_modules() -> None:
    alone, ranks = CacheConfig(use_cache="Lazy", calibration="a.safetensors"), ParallelConfig(ulysses_degree=2)
    with pytest.raises(ValueError, match="^use_cache='Lazy' decides within blocks") as caught:
        check_combination(alone, ranks)
    assert "\n" not in str(caught.value) and "enable_adacorrection" in str(caught.value)
    check_combination(dataclasses.replace(alone, enable_adacorrection=True), ranks)


def test_settings_of_learning_are_checked(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", None) as engine:
        with pytest.raises(TypeError, match="lazy_ration; did you mean lazy_ratio"):
            engine.record(lazy_ration=0.5)
        with pytest.raises(ValueError, match="^lazy_ratio=2: expected a number, between 0 and 1"):
            engine.record(lazy_ratio=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lazy_ratio", "2"], "xdit calibrate: --lazy_ratio 2.0: expected a number, between 0 and 1"),
        (["--level", "trajectory", "--lazy_fit", "published"], "xdit calibrate: --lazy_fit belongs to --level blocks"),
        (["--lazy_fit", "publishd"], "did you mean published?"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", "--num_images", "1", "--output", str(tmp_path / "a.safetensors"), *arguments])
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("xdit calibrate:")]
    assert caught.value.code == 2 and said in line
