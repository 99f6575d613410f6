"""The numbers that are reported, against counts made here."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from toys import ALWAYS, FAMILIES, LEVELS, Toy, attached, counted, drive

from xfuser.model_executor.cache.blocks.probe import sample_tokens

STEPS = 10
BUDGET = {"enable_adacorrection": True, "adacorr_budget": 0.5}
BOUND = {"enable_adacorrection": True, "adacorr_tolerance": 0.1}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "Tea": ("Tea", {"rel_l1_thresh": 0.4}),
    "Fb": ("Fb", {"rel_l1_thresh": 0.7}),
    "Tea+budget": ("Tea", BUDGET),
    "Fb+budget": ("Fb", BUDGET),
    "Tea+bound": ("Tea", BOUND),
    "blend": ("Fb", {"enable_adacorrection": True, "adacorr_mode": "blend", "adacorr_score": "relative"}),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hit_rate_is_what_was_not_evaluated(toy: Toy, run: str) -> None:
    method, settings = RUNS[run]
    with counted(toy) as counts, attached(toy.pipeline, "pipeline", method, **settings) as engine:
        toy.images(STEPS)
        summary = engine.summary()
        (plan,) = summary["plan"].values()
        assert [sum(column) for column in zip(*plan, strict=True)] == counts
        toy.images(STEPS - 2, batch=2)
        summary = engine.summary()
    calls = 2 * STEPS - 2
    assert summary["hit_rate"] == pytest.approx(1 - sum(counts) / (calls * len(counts)), abs=1e-12)
    assert summary["calls"] == calls
    assert summary["evaluated"] == sum(counts)
    assert summary["generations"] == 2
    assert summary["steps"] == STEPS - 2
    assert summary["blocks"] == len(counts) == len(toy.blocks)
    assert (summary["hit_rate"] > 0) == (run != "blend")


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_summary_is_plain_json(toy: Toy, run: str) -> None:
    method, settings = RUNS[run]
    with attached(toy.pipeline, "pipeline", method, **settings) as engine:
        empty = engine.summary()
        toy.images(6)
        summary = engine.summary()
    for each in (empty, summary):
        assert json.loads(json.dumps(each, allow_nan=False)) == each
    for name in ("plan", "weights", "offsets", "predicted_errors", "true_errors"):
        (table,) = summary[name].values()
        assert [len(row) for row in table] == [len(toy.blocks)] * 6
    assert (empty["hit_rate"], empty["calls"], empty["steps"]) == (0, 0, 0)


def flops_of(toy: Toy) -> int:
    """Multiplications and additions of a generation, by torch's own counter."""

    def attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        drive(toy.transformer, STEPS)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def full_flops() -> dict[str, int]:
    """By family, what a generation without a cache takes; filled as it is needed."""
    return {}


def share_saved(toy: Toy, full: dict[str, int], method: str, **settings: Any) -> tuple[float, float]:
    """The share of FLOPs that a cached generation saves in the end: by the engine's account, and by torch's."""
    if toy.family not in full:
        full[toy.family] = flops_of(toy)
    with attached(toy.pipeline, "transformer", method, num_steps=STEPS, **settings) as engine:
        cached = flops_of(toy)
        summary = engine.summary()
        return summary["flops_saved"] - summary["signal_flops"], 1 - cached / full[toy.family]


@pytest.mark.parametrize(
    ("family", "run"), [("dit", run) for run in RUNS] + [("flux", run) for run in ("Tea", "Fb", "Tea+budget")]
)
def test_flops_saved_is_what_torch_counts(toy: Toy, run: str, full_flops: dict[str, int]) -> None:
    """Everything is counted that the cached run computes, the cache's own measurements included."""
    method, settings = RUNS[run]
    thresholds = {"dit": {"Tea": 0.3, "Fb": 0.1}, "flux": {"Tea": 0.5, "Fb": 0.6}}
    settings = settings | {"rel_l1_thresh": thresholds[toy.family][method]}
    saved, counted = share_saved(toy, full_flops, method, **settings)
    assert saved == pytest.approx(counted, abs=0.01)
    assert 0 <= saved < 1


@pytest.mark.parametrize("method", ["Tea", "Fb"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_saved_when_nearly_everything_is_reused(toy: Toy, method: str, full_flops: dict[str, int]) -> None:
    saved, counted = share_saved(toy, full_flops, method, rel_l1_thresh=ALWAYS)
    assert saved == pytest.approx(counted, abs=0.01)
    assert saved > 0.5


@pytest.mark.parametrize("method", ["Tea", "Fb"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_is_spent_and_not_overspent(toy: Toy, level: str, method: str) -> None:
    """Within one step of what was asked for, and never less for a larger budget."""
    steps, blocks = 14, len(toy.blocks)
    spent = []
    for budget in (0.3, 0.5, 0.74):
        settings = {"enable_adacorrection": True, "adacorr_budget": budget}
        told = {"num_steps": steps} if level == "transformer" else {}
        with counted(toy) as counts, attached(toy.pipeline, level, method, **settings, **told) as engine:
            toy.images(steps)
            assert engine.summary()["evaluated"] == sum(counts)
        assert abs(sum(counts) - budget * blocks * steps) <= blocks
        spent.append(sum(counts))
    assert spent == sorted(set(spent))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("family", "method", "threshold"),
    [("dit", "Tea", 0.4), ("dit", "Tea", ALWAYS), ("dit", "Fb", 0.3), ("flux", "Tea", 0.5), ("flux", "Fb", 0.7)],
)
def test_the_default_budget_is_what_the_base_method_proposes(
    toy: Toy, level: str, method: str, threshold: float
) -> None:
    """Within two steps: a base that proposes nothing after the first step is known for it only when the dense opening
    is over. Fb's probed block is spent whether it proposes to go on or not.
    """
    steps, blocks = 20, len(toy.blocks)
    settings = {"rel_l1_thresh": threshold, "enable_adacorrection": True}
    told = {"num_steps": steps} if level == "transformer" else {}
    with attached(toy.pipeline, level, method, **settings, **told) as engine:
        toy.images(steps)
        summary = engine.summary()
    whole = round(summary["proposed_share"] * steps)
    asked = whole * blocks + (steps - whole) * (method == "Fb")
    assert 0 < whole < steps
    assert abs(summary["evaluated"] - asked) <= 2 * blocks


def test_true_errors_are_those_of_the_stand_in(dit: Toy) -> None:
    """Everything evaluated, reuse as the stand-in: the error is ||r - r before|| / ||output|| of the sampled tokens."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    settings = {"enable_adacorrection": True, "adacorr_budget": 1.0, "approximation": "residual"}
    block = dit.blocks[2]
    with ExitStack() as stack:
        hook = block.register_forward_hook(lambda _, args, out: (inputs.append(args[0]), outputs.append(out)) and None)
        stack.callback(hook.remove)
        engine = stack.enter_context(attached(dit.pipeline, "transformer", "Tea", num_steps=5, **settings))
        drive(dit.transformer, 5)
        summary = engine.summary()
    true = [row[2] for row in summary["true_errors"]["0"]]
    offsets = [row[2] for row in summary["offsets"]["0"]]
    assert true[0] is None
    for step in range(1, 5):
        now, before = (sample_tokens(outputs[i] - inputs[i]).double() for i in (step, step - 1))
        expected = float((now - before).norm() / sample_tokens(outputs[step]).double().norm())
        assert true[step] == pytest.approx(expected, rel=1e-3)
        hidden, previous = (sample_tokens(inputs[i]).double() for i in (step, step - 1))
        scale = previous.norm(dim=-1).mean()
        drift = (hidden - previous).norm(dim=-1).mean() / scale
        spread, spread_before = (each.std(dim=-1, correction=0).mean() for each in (hidden, previous))
        score = drift**2 + (spread - spread_before).abs() / (scale / math.sqrt(hidden.shape[-1]))
        assert offsets[step] == pytest.approx(float(score), rel=1e-3, abs=1e-6)
    assert 0 <= summary["prediction_coverage"] <= 1


def test_two_branches_are_counted_apart(dit: Toy) -> None:
    sample = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with attached(dit.pipeline, "transformer", "Tea", rel_l1_thresh=ALWAYS) as engine, torch.no_grad():
        for step in range(4):
            for label in (5, 1000):
                dit.transformer(
                    sample + 0.01 * step, timestep=torch.tensor([900 - step]), class_labels=torch.tensor([label])
                )
        summary = engine.summary()
    assert (summary["branches"], summary["steps"], summary["calls"]) == (2, 4, 8)
    assert summary["plan"]["0"] == summary["plan"]["1"]
    assert summary["hit_rate"] == 0.75


def test_memory_is_reported_and_freed(dit: Toy) -> None:
    """One remembered evaluation of the whole stack: its input and its output, 2 x 16 tokens x 16 channels each."""
    with attached(dit.pipeline, "transformer", "Tea", rel_l1_thresh=0) as engine:
        drive(dit.transformer, 3)
        assert engine.summary()["memory_bytes"] == 2 * (2 * 16 * 16) * 4
        engine.reset()
        assert engine.summary()["memory_bytes"] == 0
    assert math.isfinite(engine.summary()["hit_rate"])
