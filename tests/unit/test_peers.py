"""What benchmark/peers.py counts and forecasts with."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from benchmark.peer_mean_velocity import MeanVelocity, mean_velocity, shortest_path
from benchmark.peer_methods import UNCACHED, all_peers
from benchmark.peer_tools import (
    BlockCounter,
    HeldBytes,
    Polynomial,
    StepCache,
    Weighted,
    evenly,
    fit_descent,
    fit_least_squares,
    plain,
)
from benchmark.peers_report import compare, frontier_picture, short_picture, table_of
from evaluation.metrics import psnr, worst_tenth

STEPS = 50


class Line(nn.Module):
    """A denoiser whose outputs lie on a straight line over its calls."""

    def __init__(self, start: torch.Tensor, slope: torch.Tensor) -> None:
        super().__init__()
        self.start, self.slope, self.calls = start, slope, 0

    def forward(self, step: int, return_dict: bool = True) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        self.calls += 1
        output = self.start + step * self.slope
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


@pytest.fixture(scope="module")
def pipeline() -> tuple[DiTTransformer2DModel, DDIMScheduler]:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(2, 8, in_channels=4, out_channels=4, num_layers=3, sample_size=4).eval()
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return transformer, scheduler


@torch.no_grad()
def denoise(pipeline: tuple[DiTTransformer2DModel, DDIMScheduler], steps: int, rows: int = 3) -> torch.Tensor:
    transformer, scheduler = pipeline
    scheduler.set_timesteps(steps)
    latents = torch.randn((rows, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(rows)
    for timestep in scheduler.timesteps:
        output = transformer(latents, timestep=timestep.expand(rows), class_labels=labels).sample
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


def counters(transformer: nn.Module) -> tuple[BlockCounter, BlockCounter]:
    return BlockCounter.of_blocks(transformer), BlockCounter.of_parts(transformer)


def test_counter_sees_all_and_no_more(pipeline: tuple[DiTTransformer2DModel, DDIMScheduler]) -> None:
    transformer = pipeline[0]
    own = counters(transformer)
    try:
        plain_images = denoise(pipeline, STEPS)
        whole = [counter.take() for counter in own]
        denoise(pipeline, STEPS)
        assert [counter.take() / total for counter, total in zip(own, whole, strict=True)] == [1.0, 1.0]
        for steps in (19, 15, 11):
            denoise(pipeline, steps)
            shares = [counter.take() / total for counter, total in zip(own, whole, strict=True)]
            assert shares == pytest.approx([steps / STEPS] * 2, rel=1e-12)
        denoise(pipeline, STEPS, rows=1)
        assert own[0].take() / whole[0] == pytest.approx(1 / 3)
    finally:
        for counter in own:
            counter.undo()
    assert not any("forward" in vars(block) for block in transformer.transformer_blocks)
    assert torch.equal(denoise(pipeline, STEPS), plain_images)


def test_counter_counts_evaluated_steps_only(pipeline: tuple[DiTTransformer2DModel, DDIMScheduler]) -> None:
    transformer = pipeline[0]
    own = counters(transformer)
    try:
        denoise(pipeline, STEPS)
        whole = [counter.take() for counter in own]
        StepCache(transformer, STEPS, evenly(15, STEPS), Polynomial(1))
        for _ in range(2):  # the second generation begins anew
            denoise(pipeline, STEPS)
            shares = [counter.take() / total for counter, total in zip(own, whole, strict=True)]
            assert shares == pytest.approx([15 / STEPS] * 2)
    finally:
        del transformer.forward
        for counter in own:
            counter.undo()


def test_work_inside_of_blocks_is_told_apart(pipeline: tuple[DiTTransformer2DModel, DDIMScheduler]) -> None:
    transformer = pipeline[0]
    blocks, parts = own = counters(transformer)
    attentions = [block.attn1 for block in transformer.transformer_blocks]
    originals = [attention.forward for attention in attentions]
    try:
        denoise(pipeline, 2)
        whole = [counter.take() for counter in own]
        for attention in attentions:
            attention.forward = lambda hidden_states, **_: hidden_states
        denoise(pipeline, 2)
        assert blocks.take() == whole[0]
        # 8 d² of 12 d² + 2 N d, with d = 16 and N = 4 tokens.
        assert parts.take() / whole[1] == pytest.approx(8 * 256 / (12 * 256 + 2 * 4 * 16))
    finally:
        for attention, original in zip(attentions, originals, strict=True):
            attention.forward = original
        for counter in own:
            counter.undo()


def test_mean_velocity_by_hand() -> None:
    """Velocities 1 and 2 from 4 to 3 and to 2: their average is 1.5, so the product is (1 - 1.5) / -2."""
    times = torch.tensor([4.0, 3.0, 2.0, 1.0])
    latents = [torch.tensor(each) for each in (0.0, -1.0, -3.0)]
    velocities = [torch.tensor(1.0), torch.tensor(2.0)]
    assert float(mean_velocity(latents, velocities, times, window=2)) == 2.25
    assert float(mean_velocity(latents, velocities, times, window=6)) == 2.25
    assert float(mean_velocity(latents, velocities, times, window=1)) == 2.0


def test_the_shortest_path_is_the_best_of_all_placements() -> None:
    off = torch.rand(7, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    off[torch.arange(7)[:, None] >= torch.arange(8)] = torch.inf
    for evaluations, power in ((3, 1.0), (4, 4.0)):
        nodes, windows = shortest_path(off, evaluations, power)
        costs = {}
        for rest in itertools.combinations(range(1, 7), evaluations - 1):
            stops = (0, *rest, 7)
            costs[stops[:-1]] = sum(float(off[a, b].min()) ** power for a, b in itertools.pairwise(stops))
        assert tuple(nodes) == min(costs, key=costs.__getitem__)
        ends = [*nodes[1:], 7]
        assert windows == [1 + int(off[a, b].argmin()) for a, b in zip(nodes, ends, strict=True) for _ in range(b - a)]


def test_mean_velocity_leaves_evaluated_steps_alone(pipeline: tuple[DiTTransformer2DModel, DDIMScheduler]) -> None:
    transformer, scheduler = pipeline
    plain_images = denoise(pipeline, 12)
    watched = MeanVelocity(scheduler)
    try:
        assert torch.equal(denoise(pipeline, 12), plain_images)
        assert watched.plan(12, 1.0) == list(range(12))
        assert torch.equal(denoise(pipeline, 12), plain_images)
        watched.nodes = None
        denoise(pipeline, 12)
        StepCache(transformer, 12, watched.plan(5, 1.0), Polynomial(0))
        near = [(denoise(pipeline, 12) - plain_images).abs().max() for _ in range(2)]
        watched.windows = [1] * 12
        reused = (denoise(pipeline, 12) - plain_images).abs().max()
    finally:
        del transformer.forward, scheduler.step
    assert near[0] == near[1] > 0 and near[0] != reused


@pytest.mark.parametrize("count", [2, 5, 19])
def test_first_order_is_exact_on_a_line(count: int) -> None:
    start, slope = torch.randn(2, 3, 4, dtype=torch.float64)
    denoiser = Line(start, slope)
    chosen = evenly(count, STEPS)
    StepCache(denoiser, STEPS, chosen, Polynomial(1))
    for _ in range(2):
        outputs = [denoiser(step).sample for step in range(STEPS)]
        for step in range(chosen[1], STEPS):
            torch.testing.assert_close(outputs[step], start + step * slope, rtol=1e-12, atol=1e-12)
        # One point makes no line.
        assert all(torch.equal(outputs[step], start) for step in range(chosen[1]))
    assert denoiser.calls == 2 * count


def test_branches_of_guidance_are_forecast_apart() -> None:
    start, slope = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -3.0], dtype=torch.float64)
    denoiser = Line(start, slope)
    StepCache(denoiser, 6, [0, 1, 3], Polynomial(1), branches=2)
    for _ in range(2):
        for step in range(6):
            for shift in (0, 100):  # the other branch is another line
                output = denoiser(step + shift).sample
                torch.testing.assert_close(output, start + (step + shift) * slope, rtol=1e-12, atol=1e-12)
    assert denoiser.calls == 2 * 2 * 3


def test_order_zero_repeats() -> None:
    denoiser = Line(torch.zeros(2), torch.ones(2))
    StepCache(denoiser, 6, [0, 3], Polynomial(0))
    assert [denoiser(step, return_dict=False)[0][0].item() for step in range(6)] == [0, 0, 0, 3, 3, 3]


def test_a_step_cache_needs_its_first_step() -> None:
    with pytest.raises(ValueError, match="step 0"):
        StepCache(Line(torch.zeros(1), torch.zeros(1)), 4, [1, 2], Polynomial(0))


def test_fitted_weights_follow_a_recurrence() -> None:
    values = torch.randn((3, 40), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.arange(8, dtype=torch.float64)[:, None]
    outputs = values[0] + times * values[1]
    exact = fit_least_squares(outputs)
    assert torch.equal(exact, exact.tril(-1))
    forecaster = Weighted(exact)
    for step in range(8):
        output = outputs[step] if step < 3 else forecaster.predict(step)
        torch.testing.assert_close(output, outputs[step], rtol=1e-3, atol=1e-3)
        forecaster.remember(step, output, step < 3)

    def error(weights: torch.Tensor) -> float:
        return float((weights @ outputs - outputs)[1:].square().mean())

    repeated = torch.diag_embed(torch.ones(7, dtype=torch.float64), offset=-1)
    assert error(exact) < error(fit_descent(outputs)) < error(repeated)


def test_psnr_of_known_arrays() -> None:
    black = np.zeros((3, 12, 12, 1), np.float32)
    images = np.stack([np.full((12, 12, 1), value, np.float32) for value in (0.1, 0.5, 1.0)])
    assert psnr(images, black) == pytest.approx([20.0, -20 * math.log10(0.5), 0.0], abs=1e-5)
    assert psnr(black, black).tolist() == [100.0] * 3


def test_worst_tenth() -> None:
    assert worst_tenth(np.arange(40.0)[::-1]) == 1.5
    assert worst_tenth(np.array([3.0, 2.0])) == 2.0


def test_held_bytes_are_what_was_added() -> None:
    module, kept = nn.Identity(), []
    held = HeldBytes(module, 10)
    for _ in range(10):
        module(torch.zeros(1))
        kept.append(torch.zeros(1000))
    held.remove()
    assert held.difference == 9 * 4000


def test_rows_have_names_of_their_own_and_settings_that_survive_json() -> None:
    peers = all_peers(STEPS)
    assert peers[0].name == UNCACHED
    assert len({peer.name for peer in peers}) == len(peers)
    for peer in peers:
        assert json.loads(json.dumps(plain(peer.settings), allow_nan=False)) == plain(peer.settings)
    assert {peer.steps for peer in peers} == {None, 19, 15, 11}


def test_comparison_takes_the_best_that_is_cheap_enough() -> None:
    def row(name: str, family: str, compute: float, quality: float) -> dict:
        images = {"psnr": [quality] * 4, "psnr_fine": [quality] * 4}
        named = {"row": name, "family": family, "does_not_run": None, "compute_inside": compute, "settings": {"x": 1}}
        return named | {"psnr": {"value": quality}, "images": images}

    broken = {"row": "broken", "family": "other", "does_not_run": "does not run: ValueError"}
    rows = [row("ours", "trajectory", 0.3, 40.0), row("a", "other", 0.2, 30.0), row("b", "other", 0.305, 35.0)]
    (found,) = compare([*rows, row("c", "other", 0.5, 50.0), broken])
    assert (found["row"], found["against"]) == ("ours", "b")
    assert found["psnr_difference"]["value"] == pytest.approx(5.0)


def test_table_and_picture_leave_out_what_does_not_run() -> None:
    interval = {"value": 30.0, "low": 29.0, "high": 31.0}
    names = ("compute", "compute_inside", "speedup", "psnr_worst_tenth", "psnr_fine_worst_tenth")
    scores = dict.fromkeys(("psnr", "psnr_fine", "ssim"), interval) | dict.fromkeys(names, 0.5)
    unknown = dict.fromkeys(("fid_vs_uncached", "kid_vs_real", "bytes_held", "does_not_run"))
    good = {"row": "a", "family": "f", "settings": {"x": 1}} | scores | unknown
    broken = {"row": "b", "family": "f", "settings": {"x": 2}, "does_not_run": "does not run: TypeError: no"}
    assert table_of([good, broken]).row_count == 1
    assert frontier_picture([good, broken], "f").startswith(b"\x89PNG")
    assert frontier_picture([broken], "f").startswith(b"\x89PNG")


def test_the_short_picture_draws_every_family_that_runs_and_what_is_cheap_enough_of_it() -> None:
    def row(family: str, compute: float, quality: float, problem: str | None = None) -> dict:
        named = {"row": f"{family} {compute}", "family": family, "settings": {"x": 1}, "does_not_run": problem}
        return named | {"compute_inside": compute, "psnr": {"value": quality}}

    rows = [row(f"family {index}", 0.2 + 0.1 * each, 40.0 + each) for index in range(12) for each in range(3)]
    drawn = short_picture([*rows, row("trajectory", 0.3, 50.0)], "trajectory")
    assert drawn.startswith(b"\x89PNG")
    unseen = [row("trajectory", 0.95, 70.0), row("broken", 0.3, 90.0, "does not run")]
    assert short_picture([*rows, row("trajectory", 0.3, 50.0), *unseen], "trajectory") == drawn
    assert short_picture(rows, "trajectory") != drawn
