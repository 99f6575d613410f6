"""What a calibration holds, checked against independent computations, and whom it refuses to serve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import STEPS, calibration_of, maps_of, noise_of, polynomial_of, recorded
from toys import ALL_FAMILIES, ALWAYS, FAMILIES, Toy, attached, drive

from xfuser.model_executor.adapters import spec_of
from xfuser.model_executor.cache.calibration.linear import RIDGE as MAP_RIDGE
from xfuser.model_executor.cache.calibration.store import Calibration, FittedWeights
from xfuser.model_executor.cache.policies.tea import fit_polynomial

# -- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [(5,), (5, 4), (6, 3, 0), (2, 1, 0)])
def test_weights_are_the_least_squares_ones(nodes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    histories, outputs = torch.randn(2, 3, 8, 40, generator=generator)
    calibration = calibration_of(histories, outputs)
    assert (calibration.steps, calibration.blocks) == (8, 1)
    for row in range(3):
        weights, error = calibration.weights(row, 7, nodes)
        basis, target = histories[row, list(nodes)].T.double().numpy(), histories[row, 7].double().numpy()
        best, *_ = np.linalg.lstsq(basis, target, rcond=None)
        assert weights == pytest.approx(tuple(best), abs=1e-3)
        missed = np.linalg.norm(target - basis @ best) / float(torch.linalg.vector_norm(outputs[row, 7]))
        assert error == pytest.approx(missed, rel=1e-3)


def test_a_residual_that_the_others_combine_to_is_found() -> None:
    """r_3 = 2 r_2 - 0.5 r_0, with no error but the ridge's."""
    generator = torch.Generator().manual_seed(1)
    history = torch.randn(4, 500, generator=generator)
    history[3] = 2 * history[2] - 0.5 * history[0]
    calibration = calibration_of(history.expand(3, -1, -1), history.expand(3, -1, -1))
    weights, error = calibration.weights(0, 3, (2, 1, 0))
    assert weights == pytest.approx((2, 0, -0.5), abs=2e-3)
    assert error < 1e-3


def test_parallel_residuals_share_the_weight() -> None:
    """Without the ridge there would be no answer."""
    history = torch.ones(3, 10)
    weights, error = calibration_of(history.expand(3, -1, -1), history.expand(3, -1, -1)).weights(0, 2, (1, 0))
    assert weights == pytest.approx((0.5, 0.5), abs=1e-3)
    assert error < 1e-3


def test_residuals_of_zero_need_no_weights() -> None:
    """A block that adds nothing (its gates are closed) is no reason to fall over."""
    nothing = torch.zeros(3, 4, 10)
    _, error = calibration_of(nothing, torch.ones(3, 4, 10)).weights(0, 3, (2, 1, 0))
    assert error < 1e-3


@pytest.mark.parametrize("probed", [0, 1])
def test_the_row_of_the_run(probed: int) -> None:
    """Row ``blocks`` asks for the run behind the probed blocks, of which the calibration has two."""
    generator = torch.Generator().manual_seed(0)
    histories, outputs = torch.randn(2, 6, 5, 30, generator=generator)
    calibration = calibration_of(histories, outputs)
    fitted = FittedWeights(calibration, probed)
    assert (fitted.order, fitted.shared) == (2, False)
    for row, of in ((0, 0), (3, 3), (4, 4 + probed)):
        weights, error = calibration.weights(of, 4, (3, 1))
        assert fitted.weights(row, 4, (3, 1), 1.0) == pytest.approx(weights)
        assert fitted.weights(row, 4, (3, 1), 0.0) == pytest.approx((1.0, 0.0))
        half = ((1 + weights[0]) / 2, weights[1] / 2)
        assert fitted.weights(row, 4, (3, 1), 0.5) == pytest.approx(half)
        assert fitted.expectation(row, 4, (3, 1)) == (error, 1)
        assert len(fitted.weights(row, 4, (3, 2, 1, 0), 1.0)) == 3


# -- what is recorded ----------------------------------------------------------------------------------------------


@contextmanager
def watching(toy: Toy) -> Iterator[list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Per block, the image stream before and after it at every step."""
    spec = spec_of(toy.transformer)
    place = spec.groups[0].returns.index("hidden_states")
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in toy.blocks]

    def noting(index: int) -> Callable[..., None]:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            after = output[place] if isinstance(output, tuple) else output
            seen[index].append((args[0] if args else kwargs["hidden_states"], after))

        return note

    with ExitStack() as stack:
        for index, block in enumerate(toy.blocks):
            stack.callback(block.register_forward_hook(noting(index), with_kwargs=True).remove)
        yield seen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rows_are_blocks_and_both_runs(toy: Toy, batch: int) -> None:
    """So few tokens are all kept, so Gram matrices and norms are those of the hidden states, over two generations."""
    with watching(toy) as seen:
        calibration = recorded(toy, seeds=(0, 5), batch=batch)
    blocks = len(toy.blocks)
    spans = [*((block, block) for block in range(blocks)), (0, blocks - 1), (1, blocks - 1)]
    assert (calibration.blocks, calibration.steps) == (blocks, STEPS)
    assert calibration.gram.shape == (blocks + 2, STEPS, STEPS) and calibration.gram.dtype == torch.float64
    for row, (first, last) in enumerate(spans):
        gram, square = torch.zeros(STEPS, STEPS, dtype=torch.float64), torch.zeros(STEPS, dtype=torch.float64)
        for start in (0, STEPS):
            steps = range(start, start + STEPS)
            residuals = torch.stack([(seen[last][s][1] - seen[first][s][0]).flatten().double() for s in steps])
            gram += residuals @ residuals.T
            square += torch.stack([seen[last][s][1].double().square().sum() for s in steps])
        torch.testing.assert_close(calibration.gram[row], gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max()))
        torch.testing.assert_close(calibration.output_square[row], square, rtol=1e-4, atol=0)


def test_the_expected_error_is_the_true_one(flux: Toy) -> None:
    """Where residuals are nearly parallel, little is left of large numbers: sums need all their digits."""
    with watching(flux) as seen:
        calibration = recorded(flux, 20)
    for block in range(len(flux.blocks)):
        residuals = torch.stack([(after - before).flatten().double() for before, after in seen[block]])
        for step in (6, 12, 19):
            nodes = [step - 1, step - 2, step - 3]
            weights, error = calibration.weights(block, step, tuple(nodes))
            missed = residuals[step] - torch.tensor(weights, dtype=torch.float64) @ residuals[nodes]
            true = torch.linalg.vector_norm(missed) / torch.linalg.vector_norm(seen[block][step][1].double())
            assert error == pytest.approx(float(true), rel=0.1)


def test_noise_is_the_mean_squared_change_of_the_input(dit: Toy) -> None:
    with watching(dit) as seen:
        calibration = recorded(dit, batch=2)
    for block, steps in enumerate(seen):
        changes = [
            float((now[0] - before[0]).square().sum() / before[0].square().sum())
            for before, now in zip(steps, steps[1:], strict=False)
        ]
        assert noise_of(calibration)[block] == pytest.approx(sum(changes) / (STEPS - 1), rel=1e-4)


def test_maps_are_fitted_on_the_settled_steps(dit: Toy) -> None:
    """Pairs of steps from the fourth on, one to three steps apart, all counting alike."""
    with watching(dit) as seen:
        calibration = recorded(dit)
    assert set(maps_of(calibration)) == {(block, 0) for block in range(len(dit.blocks))}
    for block, steps in enumerate(seen):
        square = cross = 0
        for now in range(3, STEPS):
            for old in range(max(3, now - 3), now):
                change = (steps[now][0] - steps[old][0]).flatten(0, 1).double()
                moved = (steps[now][1] - steps[old][1]).flatten(0, 1).double() - change
                square, cross = square + change.T @ change, cross + change.T @ moved
        ridge = MAP_RIDGE * square.diagonal().mean() * torch.eye(len(square))
        expected = torch.linalg.solve(square + ridge, cross).float()
        torch.testing.assert_close(maps_of(calibration)[block, 0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_count_like_generations(toy: Toy) -> None:
    """Driven without a scheduler, and twice a step: sums double, means stay."""
    with attached(toy.pipeline, "transformer", None, num_steps=STEPS) as engine:
        engine.record()
        drive(toy.transformer, STEPS)
        alone = engine.recorded()
        drive(toy.transformer, STEPS)
        twice = engine.recorded()
    torch.testing.assert_close(twice.gram, 2 * alone.gram)
    torch.testing.assert_close(twice.output_square, 2 * alone.output_square)
    assert noise_of(twice) == pytest.approx(noise_of(alone))
    for key, matrix in maps_of(alone).items():
        torch.testing.assert_close(maps_of(twice)[key], matrix, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_recording_changes_no_bit_and_costs_nothing_afterwards(toy: Toy) -> None:
    expected = toy.plain_images(STEPS)
    with attached(toy.pipeline, "pipeline", None) as engine:
        toy.images(STEPS)
        plain = engine.known_flops()
    with attached(toy.pipeline, "pipeline", "Tea", rel_l1_thresh=ALWAYS) as engine:
        engine.record()
        assert np.array_equal(toy.images(STEPS), expected)
        assert engine.summary()["hit_rate"] == 0
        ours = engine.known_flops()
    # A transformer's FLOPs are its own, whatever else was computed in its presence.
    assert ours.keys() == plain.keys()
    for key, flops in plain.items():
        assert ours[key].blocks == flops.blocks
        assert ours[key].total == flops.total


# -- the polynomial ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_a_polynomial_is_recovered(degree: int) -> None:
    rng = np.random.default_rng(degree)
    coefficients = rng.normal(size=degree + 1)
    signals = rng.uniform(0.001, 0.3, size=60)
    fitted = fit_polynomial([(x, float(np.polyval(coefficients, x))) for x in signals])
    grid = np.linspace(0.001, 0.3, 50)
    assert len(fitted) == 5
    np.testing.assert_allclose(np.polyval(fitted, grid), np.polyval(coefficients, grid), atol=1e-6)


def test_few_or_broken_points_do_no_harm() -> None:
    assert fit_polynomial([]) == (1.0, 0.0)
    assert fit_polynomial([(0.1, 0.2)]) == (1.0, 0.0)
    assert fit_polynomial([(0.1, 0.2), (math.nan, 1.0), (1.0, math.inf)]) == (1.0, 0.0)
    assert fit_polynomial([(0.1, 0.3), (0.2, 0.5), (0.3, 0.7)]) == pytest.approx((2.0, 0.1))
    assert all(math.isfinite(each) for each in fit_polynomial([(0.0, 0.0)] * 40))


def test_tea_takes_the_calibrated_polynomial(dit: Toy, saved: Path) -> None:
    loaded = Calibration.load(saved)
    with attached(dit.pipeline, "pipeline", "Tea", calibration=saved, rel_l1_thresh=0.5) as engine:
        dit.images(STEPS)
        assert engine.policy.coefficients == polynomial_of(loaded)
        assert engine.summary()["calibrated"] is True
        (branch,) = engine._branches.values()
    with attached(dit.pipeline, "pipeline", "Tea", rel_l1_thresh=0.5) as engine:
        assert engine.policy.coefficients == (1.0, 0.0)
    assert polynomial_of(loaded) != (1.0, 0.0)


def test_fast_takes_the_calibrated_noise_and_maps(dit: Toy, saved: Path) -> None:
    loaded = Calibration.load(saved)
    settings = {"rel_l1_thresh": ALWAYS, "calibration": saved, "motion_threshold": 2.0}
    with watching(dit) as seen, attached(dit.pipeline, "pipeline", "Fast", **settings) as engine:
        dit.images(STEPS)
        assert noise_of(engine.policy.calibration) == noise_of(loaded)
        assert engine.summary()["hit_rate"] == pytest.approx(1 - 3 / STEPS)
    for block, steps in enumerate(seen):
        reference = steps[2]
        for before, after in steps[3:]:
            expected = before + reference[1] - reference[0] + (before - reference[0]) @ maps_of(loaded)[block, 0]
            torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_noise_decides(dit: Toy, saved: Path, tmp_path: Path) -> None:
    """A thousandth of it, and nothing is noise any more."""
    loaded = Calibration.load(saved)
    quiet = tmp_path / "quiet.safetensors"
    less = {"Fast": {"noise": loaded.sections["Fast"]["noise"] / 1e6}}
    dataclasses.replace(loaded, sections=loaded.sections | less).save(quiet)
    hit_rates = []
    for path in (saved, quiet):
        with attached(dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, calibration=path) as engine:
            dit.images(STEPS)
            hit_rates.append(engine.summary()["hit_rate"])
    assert hit_rates[0] > 0.2 and hit_rates[1] == 0
