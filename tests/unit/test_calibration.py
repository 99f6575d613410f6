"""What a calibration holds, checked against independent computations, and whom it refuses to serve."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline
from safetensors.torch import load_file, save_file
from toys import ALL_FAMILIES, ALWAYS, FAMILIES, Toy, attached, build_toy_dit, drive, wrapped

from xfuser.cli import main
from xfuser.model_executor.adapters import declaration_of
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_pipeline, apply_cache_on_transformer
from xfuser.model_executor.cache.calibration import Calibration, FittedWeights, fit_polynomial
from xfuser.model_executor.cache.linear import RIDGE as MAP_RIDGE
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit

STEPS = 8
FITTED = {"approximation": "fitted", "rel_l1_thresh": 0.15}


def calibration_of(histories: torch.Tensor, outputs: torch.Tensor) -> Calibration:
    """From residuals [rows, steps, n] and outputs alike."""
    histories, outputs = histories.double(), outputs.double()
    gram = histories @ histories.transpose(1, 2)
    return Calibration(gram, outputs.square().sum(2), (1.0,) * (len(gram) - 2), (1.0, 0.0), {}, {})


def recorded(toy: Toy, steps: int = STEPS, seeds: tuple[int, ...] = (0,), batch: int = 1) -> Calibration:
    with attached(toy.pipeline, "pipeline", None) as engine:
        engine.record()
        for seed in seeds:
            toy.images(steps, batch=batch, seed=seed)
        return engine.recorded()


@pytest.fixture(scope="module")
def once() -> Callable[[Toy], Calibration]:
    """Each family's calibration, recorded once."""
    known: dict[str, Calibration] = {}

    def of(toy: Toy) -> Calibration:
        if toy.family not in known:
            known[toy.family] = recorded(toy)
        return known[toy.family]

    return of


@pytest.fixture
def saved(dit: Toy, once: Callable[[Toy], Calibration], tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    once(dit).save(path)
    return path


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
    declaration = declaration_of(toy.transformer)
    place = declaration.returns.index("hidden_states")
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
        assert calibration.noise[block] == pytest.approx(sum(changes) / (STEPS - 1), rel=1e-4)


def test_maps_are_fitted_on_the_settled_steps(dit: Toy) -> None:
    """Pairs of steps from the fourth on, one to three steps apart, all counting alike."""
    with watching(dit) as seen:
        calibration = recorded(dit)
    assert set(calibration.maps) == {(block, 0) for block in range(len(dit.blocks))}
    for block, steps in enumerate(seen):
        square = cross = 0
        for now in range(3, STEPS):
            for old in range(max(3, now - 3), now):
                change = (steps[now][0] - steps[old][0]).flatten(0, 1).double()
                moved = (steps[now][1] - steps[old][1]).flatten(0, 1).double() - change
                square, cross = square + change.T @ change, cross + change.T @ moved
        ridge = MAP_RIDGE * square.diagonal().mean() * torch.eye(len(square))
        expected = torch.linalg.solve(square + ridge, cross).float()
        torch.testing.assert_close(calibration.maps[block, 0], expected, rtol=1e-3, atol=1e-4)


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
    assert twice.noise == pytest.approx(alone.noise)
    for key, matrix in alone.maps.items():
        torch.testing.assert_close(twice.maps[key], matrix, rtol=1e-3, atol=1e-5)


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
        assert engine.policy.coefficients == loaded.tea
        assert engine.summary()["calibrated"] is True
        (branch,) = engine._branches.values()
    with attached(dit.pipeline, "pipeline", "Tea", rel_l1_thresh=0.5) as engine:
        assert engine.policy.coefficients == (1.0, 0.0)
    assert loaded.tea != (1.0, 0.0)


def test_fast_takes_the_calibrated_noise_and_maps(dit: Toy, saved: Path) -> None:
    loaded = Calibration.load(saved)
    settings = {"rel_l1_thresh": ALWAYS, "calibration": saved, "motion_threshold": 2.0}
    with watching(dit) as seen, attached(dit.pipeline, "pipeline", "Fast", **settings) as engine:
        dit.images(STEPS)
        assert engine.policy.calibration.noise == loaded.noise
        assert engine.summary()["hit_rate"] == pytest.approx(1 - 3 / STEPS)
    for block, steps in enumerate(seen):
        reference = steps[2]
        for before, after in steps[3:]:
            expected = before + reference[1] - reference[0] + (before - reference[0]) @ loaded.maps[block, 0]
            torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_noise_decides(dit: Toy, saved: Path, tmp_path: Path) -> None:
    """A thousandth of it, and nothing is noise any more."""
    loaded = Calibration.load(saved)
    quiet = tmp_path / "quiet.safetensors"
    dataclasses.replace(loaded, noise=tuple(each / 1e6 for each in loaded.noise)).save(quiet)
    hit_rates = []
    for path in (saved, quiet):
        with attached(dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, calibration=path) as engine:
            dit.images(STEPS)
            hit_rates.append(engine.summary()["hit_rate"])
    assert hit_rates[0] > 0.2 and hit_rates[1] == 0


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_holds_what_was_recorded(flux: Toy, once: Callable[[Toy], Calibration], tmp_path: Path) -> None:
    calibration = once(flux)
    path = tmp_path / "deeper" / "a.b.safetensors"
    calibration.save(path)
    assert sorted(each.name for each in path.parent.iterdir()) == ["a.b.json", "a.b.safetensors"]
    loaded = Calibration.load(path)
    assert torch.equal(loaded.gram, calibration.gram) and torch.equal(loaded.output_square, calibration.output_square)
    assert (loaded.noise, loaded.tea, loaded.provenance) == (
        calibration.noise,
        calibration.tea,
        json.loads(json.dumps(calibration.provenance)),
    )
    # Maps of both streams, in half precision.
    assert set(loaded.maps) == {(block, stream) for block in range(len(flux.blocks)) for stream in (0, 1)}
    for key, matrix in loaded.maps.items():
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix, calibration.maps[key], rtol=1e-3, atol=1e-4)
    calibration.save(path)
    assert calibration.provenance["num_steps"] == STEPS and calibration.provenance["scheduler"]


def spoil_json(path: Path, text: str) -> None:
    path.with_suffix(".json").write_text(text)


def spoil_tensors(path: Path, **tensors: Any) -> None:
    held = load_file(path) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)


SPOILED: dict[str, Callable[[Path], Any]] = {
    "no file": lambda path: path.unlink(),
    "no description": lambda path: path.with_suffix(".json").unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no JSON": lambda path: spoil_json(path, "{"),
    "not UTF-8": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe{}"),
    "a list": lambda path: spoil_json(path, "[]"),
    "a number": lambda path: spoil_json(path, "3"),
    "no schema": lambda path: spoil_json(path, "{}"),
    "another schema": lambda path: spoil_json(path, '{"schema": 99}'),
    "nothing but the schema": lambda path: spoil_json(path, '{"schema": 1}'),
    "no Gram matrices": lambda path: spoil_tensors(path, gram=None),
    "of another model altogether": lambda path: spoil_tensors(path, **{"maps.a.b": torch.zeros(1)}),
}


def refused(apply: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        apply()
    text = str(caught.value)
    assert text and "\n" not in text
    for word in ("calibration", *words):
        assert word in text


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_cannot_be_read_is_refused(dit: Toy, saved: Path, spoil: Callable[[Path], Any]) -> None:
    spoil(saved)
    refused(lambda: apply_cache_on_pipeline(dit.pipeline, "Fast", calibration=str(saved)), "xdit calibrate")
    assert "forward" not in vars(dit.transformer)


def test_another_model_is_refused(flux: Toy, saved: Path) -> None:
    apply = {"use_cache": "Fast", "calibration": str(saved)}
    refused(lambda: apply_cache_on_pipeline(flux.pipeline, **apply), "DiTTransformer2DModel", "FluxTransformer2DModel")
    refused(lambda: apply_cache_on_pipeline(build_toy_dit(layers=5), **apply), "blocks", "4", "5")
    refused(lambda: apply_cache_on_pipeline(build_toy_dit(seed=1), **apply), "weights")
    assert "forward" not in vars(flux.transformer)


def test_the_same_weights_in_half_precision_are_the_same_model(saved: Path) -> None:
    pipeline = build_toy_dit()
    pipeline.transformer.to(torch.bfloat16)
    apply_cache_on_pipeline(pipeline, "Fast", calibration=str(saved)).remove()


def test_another_scheduler_is_refused(dit: Toy, saved: Path) -> None:
    pipeline = DiTPipeline(dit.transformer, dit.pipeline.vae, DDPMScheduler())
    refused(lambda: apply_cache_on_pipeline(pipeline, "Fast", calibration=str(saved)), "DDIMScheduler", "DDPMScheduler")
    # A transformer alone has none to compare.
    apply_cache_on_transformer(dit.transformer, "Fast", calibration=str(saved), num_steps=STEPS).remove()


@pytest.mark.parametrize("value", [5, 0.5, True, ""])
def test_what_is_no_path_is_refused(dit: Toy, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="calibration"):
        apply_cache_on_pipeline(dit.pipeline, "Fast", calibration=value)
    assert "forward" not in vars(dit.transformer)


def test_another_number_of_steps_is_refused(dit: Toy, saved: Path) -> None:
    settings = {"use_cache": "Fast", "calibration": str(saved)}
    refused(lambda: apply_cache_on_pipeline(dit.pipeline, **settings, num_steps=9), "8 steps", "9")
    with attached(dit.pipeline, "pipeline", **settings) as engine:
        refused(lambda: dit.images(9), "8 steps", "9")
        # It is the generation that is refused, not the ones after it.
        dit.images(STEPS)
        refused(lambda: dit.images(7), "8 steps", "7")
        assert engine.summary()["steps"] == STEPS


def test_an_unknown_number_of_steps_is_refused_before_anything_is_changed(dit: Toy, saved: Path) -> None:
    for calibration in (str(saved), "first"):
        refused(
            lambda given=calibration: apply_cache_on_transformer(dit.transformer, "Fast", calibration=given),
            "num_steps",
        )
    assert "forward" not in vars(dit.transformer)


def test_another_number_of_steps_is_refused_as_often_as_it_is_asked(dit: Toy, saved: Path) -> None:
    with attached(dit.pipeline, "pipeline", "Fast", calibration=str(saved)):
        for _ in range(2):
            refused(lambda: dit.images(STEPS + 1), "steps", "calibrat")


# -- the first generation as the calibration -----------------------------------------------------------------------

FIRST: tuple[tuple[str | None, dict[str, Any]], ...] = (
    ("Fast", {"rel_l1_thresh": ALWAYS, "significance": 0}),
    ("Fast", {"rel_l1_thresh": ALWAYS, "motion_threshold": 0.3, "sync": "layer"}),
    ("Tea", {"rel_l1_thresh": 0.5}),
    ("Tea", FITTED),
    ("Fb", {"rel_l1_thresh": ALWAYS, "approximation": "fitted"}),
    ("Interval", {"approximation": "fitted"}),
    ("Fast", {"enable_adacorrection": True, "adacorr_budget": 0.5}),
    ("Fb", {"enable_adacorrection": True, "adacorr_tolerance": 0.3}),
    (None, {"enable_adacorrection": True, "adacorr_mode": "gate", "adacorr_tolerance": 0.3}),
    (None, {"enable_adacorrection": True, "adacorr_mode": "gate", "adacorr_tolerance": 0.3, "granularity": "token"}),
)


@pytest.mark.parametrize(("method", "settings"), FIRST, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_generation_is_whole_and_the_next_ones_hit(
    toy: Toy, method: str | None, settings: dict[str, Any]
) -> None:
    steps = 12
    expected = toy.plain_images(steps)
    with attached(toy.pipeline, "pipeline", method, calibration="first", **settings) as engine:
        assert np.array_equal(toy.images(steps), expected)
        summary = engine.summary()
        assert (summary["hit_rate"], summary["calibrated"]) == (0, False)
        images = toy.images(steps)
        summary = engine.summary()
        assert summary["calibrated"] is True
        assert 0.1 < summary["hit_rate"] * 2 < 1
        assert 0 < np.abs(images - expected).mean() < 0.2
        # What was learned is learned once.
        assert np.array_equal(toy.images(steps), images)


def test_blending_waits_for_the_first_generation(dit: Toy) -> None:
    """ "first" is evaluated in full, and nothing else: what is learned is the model, not a blend."""
    expected = dit.plain_images(STEPS)
    settings = {"enable_adacorrection": True, "adacorr_mode": "blend", "approximation": "fitted"}
    with attached(dit.pipeline, "pipeline", None, calibration="first", **settings):
        assert np.array_equal(dit.images(STEPS), expected)


def test_first_learns_what_calibrate_would(dit: Toy) -> None:
    expected = recorded(dit)
    with attached(dit.pipeline, "pipeline", "Fast", calibration="first") as engine:
        dit.images(STEPS)
        dit.images(STEPS)
        learned = engine.deliberation.calibration
    assert torch.equal(learned.gram, expected.gram)
    assert (learned.noise, learned.tea) == (expected.noise, expected.tea)
    assert learned.provenance == expected.provenance


@pytest.mark.parametrize("other", [6, 12])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("Fast", {"rel_l1_thresh": ALWAYS, "significance": 0}),
        ("Tea", FITTED),
        ("Fb", {"enable_adacorrection": True, "adacorr_tolerance": 0.3}),
        ("Tea", {"enable_adacorrection": True, "adacorr_budget": 0.6}),
        ("Fast", {"enable_adacorrection": True, "adacorr_mode": "gate", "adacorr_tolerance": 0.3}),
    ],
    ids=str,
)
def test_another_number_of_steps_is_learned_anew(dit: Toy, method: str, settings: dict[str, Any], other: int) -> None:
    expected = dit.plain_images(other)
    with attached(dit.pipeline, "pipeline", method, calibration="first", **settings) as engine:
        dit.images(9)
        dit.images(9)
        assert engine.summary()["hit_rate"] > 0
        assert np.array_equal(dit.images(other), expected)
        assert not hits(engine)
        assert not np.array_equal(dit.images(other), expected)
        assert hits(engine)
        assert engine.deliberation.calibration.steps == other


def hits(engine: CacheEngine) -> bool:
    """Whether anything was left out in the last generation."""
    return any(share < 1 for rows in engine.summary()["plan"].values() for row in rows for share in row)


def test_a_reset_keeps_what_the_first_generation_taught(dit: Toy) -> None:
    """It forgets activations and statistics. The generation was over."""
    with attached(
        dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, significance=0, calibration="first"
    ) as engine:
        dit.images(STEPS)
        engine.reset()
        dit.images(STEPS)
        assert hits(engine)


class Interrupted(Exception):
    pass


def interrupt(toy: Toy, steps: int, after: int) -> None:
    """A generation that the user ends after some steps."""
    done = []

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(done) == after:
                raise Interrupted
            done.append(None)
            return original(*args, **kwargs)

        return forward

    with pytest.raises(Interrupted), wrapped(toy.pipeline.scheduler, "scale_model_input", wrap):
        toy.images(steps)


def fail(toy: Toy, steps: int, after: int) -> None:
    """A generation in which the third block fails."""
    done = []

    def note(module: Any, args: Any) -> None:
        done.append(None)
        if len(done) > after:
            raise Interrupted

    hook = toy.blocks[2].register_forward_pre_hook(note)
    try:
        with pytest.raises(Interrupted):
            toy.images(steps)
    finally:
        hook.remove()


@pytest.mark.parametrize("ending", [interrupt, fail])
@pytest.mark.parametrize("after", [1, STEPS - 1])
def test_an_interrupted_generation_teaches_nothing(
    dit: Toy, ending: Callable[[Toy, int, int], None], after: int
) -> None:
    expected = recorded(dit, seeds=(4,))
    with attached(dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, calibration="first") as engine:
        ending(dit, STEPS, after)
        assert np.array_equal(dit.images(STEPS, seed=4), plain_images(4))
        dit.images(STEPS)
        assert torch.equal(engine.deliberation.calibration.gram, expected.gram)
        assert engine.summary()["hit_rate"] > 0


def plain_images(seed: int) -> np.ndarray:
    """From a pipeline of the same weights, since this one has a cache attached."""
    return Toy.build("dit").images(STEPS, seed=seed)


def test_an_interruption_while_learning_anew_is_forgotten(dit: Toy) -> None:
    """A job goes back to the number of steps that it knows: it hits again."""
    with attached(
        dit.pipeline, "pipeline", "Fast", rel_l1_thresh=ALWAYS, significance=0, calibration="first"
    ) as engine:
        dit.images(STEPS)
        expected = dit.images(STEPS)
        interrupt(dit, 12, 5)
        for _ in range(2):
            assert np.array_equal(dit.images(STEPS), expected)
            assert hits(engine)


def test_a_reset_in_the_middle_forgets_the_generation_but_not_the_job(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", None) as engine:
        engine.record()
        dit.images(STEPS)
        first = engine.recorded()
        interrupt(dit, STEPS, 4)
        engine.reset()
        assert torch.equal(engine.recorded().gram, first.gram)


def test_first_learns_where_the_number_of_steps_is_told(dit: Toy) -> None:
    with attached(
        dit.pipeline, "transformer", "Fast", calibration="first", rel_l1_thresh=ALWAYS, num_steps=9
    ) as engine:
        drive(dit.transformer, 9)
        drive(dit.transformer, 9, seed=1)
        assert engine.summary()["hit_rate"] > 0


def test_nothing_recorded_is_an_error(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", None) as engine:
        with pytest.raises(ValueError, match="record"):
            engine.recorded()
        engine.record()
        with pytest.raises(ValueError, match="generat"):
            engine.recorded()


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "tiny.safetensors"
    main(["calibrate", "--num_images", "2", "--num_inference_steps", "6", "--threads", "1", "--output", str(path)])
    return path


@pytest.fixture(scope="module")
def tiny() -> Toy:
    pipeline = DiTPipeline.from_pretrained(shipped_tiny_dit()).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return Toy("dit", pipeline)


def test_the_command_says_where_a_file_is_from(command: Path) -> None:
    described = json.loads(command.with_suffix(".json").read_text())
    assert (described["model"], described["images"], described["num_steps"]) == ("tiny-dit", 2, 6)
    assert (described["scheduler"], described["guidance_scale"]) == ("DDIMScheduler", 1.5)
    assert (described["transformer"], described["blocks"]) == ("DiTTransformer2DModel", 12)
    loaded = Calibration.load(command)
    assert loaded.gram.shape == (14, 6, 6) and len(loaded.noise) == 12
    assert bool(torch.isfinite(loaded.gram).all()) and all(math.isfinite(each) for each in loaded.tea)
    # Six steps leave pairs behind the settled ones.
    assert set(loaded.maps) == {(block, 0) for block in range(12)}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("Tea", {"approximation": "fitted", "rel_l1_thresh": ALWAYS}),
        ("Fb", {"approximation": "fitted", "rel_l1_thresh": ALWAYS}),
        ("Interval", {"approximation": "fitted"}),
        ("Fast", {"rel_l1_thresh": ALWAYS, "significance": 0}),
        ("Tea", {"enable_adacorrection": True, "adacorr_budget": 0.6}),
        ("Fb", {"enable_adacorrection": True, "adacorr_mode": "gate", "adacorr_tolerance": 0.5}),
        ("Fb", {"enable_adacorrection": True, "adacorr_tolerance": 0.5}),
    ],
    ids=str,
)
def test_a_file_of_the_command_serves(tiny: Toy, command: Path, method: str, settings: dict[str, Any]) -> None:
    with attached(tiny.pipeline, "pipeline", method, calibration=str(command), **settings) as engine:
        images = tiny.images(6)
        summary = engine.summary()
        assert summary["calibrated"] is True
        assert summary["approximation"] == ("linear" if method == "Fast" else "fitted")
        assert np.isfinite(images).all()
        refused(lambda: tiny.images(7), "6 steps", "7")
    assert summary["hit_rate"] > 0


def test_more_images_and_the_same_ones_again(tiny: Toy, command: Path, tmp_path: Path) -> None:
    """The same command gives the same file, and another seed another one."""
    files = []
    for name, seed in (("same", "42"), ("other", "7")):
        path = tmp_path / f"{name}.safetensors"
        arguments = ["--num_images", "2", "--num_inference_steps", "6", "--threads", "1", "--seed", seed]
        main(["calibrate", *arguments, "--output", str(path)])
        files.append(Calibration.load(path))
    known = Calibration.load(command)
    assert torch.equal(files[0].gram, known.gram) and files[0].tea == known.tea
    assert not torch.equal(files[1].gram, known.gram)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--output", "calibration.bin"], "safetensors"),
        (["--prompt", "a fox"], "--class_label"),
        (["--model_type", "flux"], "--prompt"),
        (["--class_label", "unicorn"], "unicorn"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", "--num_images", "1", "--num_inference_steps", "2", *arguments])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xdit calibrate:")]
    assert caught.value.code == 2
    assert len(told) == 1 and word in told[0]
    assert list(tmp_path.iterdir()) == []


def test_generate_reads_a_calibration(command: Path, tmp_path: Path) -> None:
    common = ["--num_images", "1", "--num_inference_steps", "6", "--threads", "1", "--calibration", str(command)]
    for name, arguments in {
        "fast": ["--use_cache", "Fast", "--rel_l1_thresh", "1"],
        "corrected": ["--use_cache", "Tea", "--enable_adacorrection", "--adacorr_budget", "0.6"],
        # No base method: the calibration is AdaCorrection's own.
        "alone": ["--use_cache", "None", "--enable_adacorrection", "--adacorr_budget", "0.6"],
    }.items():
        main(["generate", *common, *arguments, "--output_dir", str(tmp_path / name)])
        cache = json.loads((tmp_path / name / "statistics.json").read_text())["cache"]
        assert cache["calibrated"] is True, name


def engine_of(*arguments: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> CacheEngine:
    """The engine that a command line attaches."""
    engines: list[CacheEngine] = []
    original = CacheEngine.__init__

    def init(self: CacheEngine, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(CacheEngine, "__init__", init)
    fixed = ["--num_images", "1", "--num_inference_steps", "2", "--threads", "1", "--output_dir", str(folder)]
    main(["generate", *fixed, *arguments])
    return engines[-1]


@pytest.mark.parametrize(
    ("arguments", "setting", "value"),
    [
        (["--use_cache", "Fast", "--sync", "layer"], "sync", "layer"),
        (["--use_cache", "Fast", "--motion_threshold", "0.3"], "motion_threshold", 0.3),
        (["--use_cache", "Fast", "--significance", "0.2"], "significance", 0.2),
        (["--use_cache", "Fast", "--adaptive_threshold"], "adaptive_threshold", True),
        (["--use_cache", "Interval", "--interval", "5"], "interval", 5),
        (
            ["--use_cache", "Fb", "--enable_adacorrection", "--adacorr_mode", "gate", "--granularity", "token"],
            "granularity",
            "token",
        ),
        (["--use_cache", "Fb", "--enable_adacorrection", "--adacorr_mode", "gate", "--sync", "layer"], "sync", "layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_flag_reaches_the_engine(
    arguments: list[str], setting: str, value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = engine_of(*arguments, monkeypatch=monkeypatch, folder=tmp_path)
    assert getattr(engine.config, setting) == value
