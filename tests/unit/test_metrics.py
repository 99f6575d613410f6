"""The metrics against hand-computed numbers, independent implementations, and the properties they must have."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from evaluation.metrics import (
    FeatureNetwork,
    Interval,
    difference_interval,
    frechet_distance,
    frechet_interval,
    gaussian,
    kernel_distance,
    kernel_interval,
    mean_interval,
    paired_frechet_difference,
    paired_frechet_ratio,
    psnr,
    read_reference,
    ssim,
    write_reference,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def images(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(size=(3, 16, 20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork().eval().requires_grad_(False)


# ---- Fréchet distance


def test_gaussian_is_unbiased() -> None:
    mean, covariance = gaussian([[0.0, 0.0], [2.0, 4.0]])
    np.testing.assert_allclose(mean, [1, 2])
    np.testing.assert_allclose(covariance, [[2, 4], [4, 8]])


def test_frechet_of_diagonal_gaussians() -> None:
    # (3 - 0)^2 + (0 - 4)^2 + (1 - 2)^2 + (5 - 3)^2: squared distances of the means and of the standard deviations.
    assert frechet_distance([3, 0], np.diag([1.0, 25.0]), [0, 4], np.diag([4.0, 9.0])) == pytest.approx(30.0)


def test_frechet_equals_the_matrix_square_root(rng: np.random.Generator) -> None:
    (mean_a, cov_a), (mean_b, cov_b) = (gaussian(rng.normal(size=(200, 16)) * scale) for scale in (1.0, 1.5))
    root = sqrtm(cov_a @ cov_b).real
    expected = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-9)


def test_frechet_equals_torchmetrics(network: FeatureNetwork) -> None:
    real, fake = torch.rand(96, 3, 32, 32), torch.rand(96, 3, 32, 32) ** 2
    metric = FrechetInceptionDistance(feature=network, normalize=True)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert frechet_distance(*gaussian(network(real)), *gaussian(network(fake))) == pytest.approx(
        metric.compute().item(), rel=1e-4
    )


@pytest.mark.parametrize("rows", [20, 200])
def test_frechet_to_itself_is_exactly_zero(rng: np.random.Generator, rows: int) -> None:
    features = rng.normal(size=(rows, 64)) * np.geomspace(10, 0.1, 64)
    features[:, :9] = 0.0
    assert frechet_distance(*gaussian(features), *gaussian(rng.permutation(features))) == 0.0


def test_frechet_sees_a_direction_only_one_set_has() -> None:
    assert frechet_distance([0, 0], np.diag([1.0, 0.0]), [0, 0], np.diag([1.0, 4.0])) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian(np.zeros((1, 4))), "at least 2"),
        (lambda: gaussian(np.full((3, 4), np.nan)), "NaN"),
        (lambda: frechet_distance([0, 0], np.eye(3), [0, 0], np.eye(2)), "disagree"),
        (lambda: frechet_distance([0, 0], np.eye(2), [0], np.eye(1)), "expected equal"),
        (lambda: frechet_distance([0], [[np.inf]], [0], [[1]]), "infinity"),
        (lambda: kernel_distance(np.zeros((3, 4)), np.zeros((3, 5))), "expected equal"),
    ],
)
def test_distances_refuse(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- kernel distance


def test_kernel_distance_equals_a_double_loop(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3)) + 1

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within_a = [kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j]
    within_b = [kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j]
    across = [kernel(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(across)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased(rng: np.random.Generator) -> None:
    same = [kernel_distance(*rng.normal(size=(2, 40, 8))) for _ in range(300)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(300)
    assert min(same) < 0 < max(same)
    assert kernel_distance(rng.normal(size=(40, 8)), rng.normal(size=(40, 8)) + 1) > 5 * np.std(same)


def test_kernel_interval_is_what_leaving_each_image_out_scatters(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(9, 3)), rng.normal(size=(20, 3)) + 1
    without = [kernel_distance(np.delete(a, row, axis=0), b) for row in range(9)]
    reach = 1.959964 * math.sqrt(8 / 9 * sum((each - np.mean(without)) ** 2 for each in without))
    found = kernel_interval(a, b)
    assert found.value == pytest.approx(kernel_distance(a, b), rel=1e-12)
    assert (found.high - found.value, found.value - found.low) == pytest.approx((reach, reach), rel=1e-5)


def test_kernel_interval_holds_zero_where_nothing_differs(rng: np.random.Generator) -> None:
    reference = rng.normal(size=(500, 8))
    above = [kernel_interval(rng.normal(size=(40, 8)), reference).low > 0 for _ in range(100)]
    assert np.mean(above) <= 0.05
    assert kernel_interval(rng.normal(size=(40, 8)) + 1, reference).low > 0
    with pytest.raises(ValueError, match="needs 3"):
        kernel_interval(reference[:2], reference)


# ---- similarity


def test_psnr_of_a_known_offset() -> None:
    dark = np.full((2, 8, 8, 3), 0.4)
    np.testing.assert_allclose(psnr(dark + [[[[0.1]]], [[[0.01]]]], dark), [20.0, 40.0])


def test_identical_images(images: np.ndarray) -> None:
    np.testing.assert_allclose(psnr(images, images), 100.0)
    np.testing.assert_allclose(ssim(images, images), 1.0)


def test_similarity_is_per_image_and_falls_with_noise(images: np.ndarray, rng: np.random.Generator) -> None:
    noise = np.array([0.0, 0.05, 0.3]).reshape(3, 1, 1, 1) * rng.normal(size=images.shape)
    noisy = np.clip(images + noise, 0, 1)
    for metric in (psnr, ssim):
        values = metric(noisy, images)
        assert values.shape == (3,)
        assert (np.diff(values) < 0).all()
        np.testing.assert_allclose(metric(noisy[1:2], images[1:2]), values[1:2])


def test_ssim_of_constant_images() -> None:
    # No variance, so only the luminance term remains: (2 * 0.4 * 0.5 + 0.01^2) / (0.4^2 + 0.5^2 + 0.01^2).
    images, references = np.full((1, 16, 16, 1), 0.4), np.full((1, 16, 16, 1), 0.5)
    assert ssim(images, references)[0] == pytest.approx(0.4001 / 0.4101)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 16, 16, 3)), "expected equal"),
        (np.zeros((3, 16, 20, 3), dtype=np.uint8), "expected floats"),
        (np.full((3, 16, 20, 3), 255.0), r"within \[0, 1\]"),
        (np.full((3, 16, 20, 3), np.nan), r"within \[0, 1\]"),
    ],
)
def test_similarity_refuses(images: np.ndarray, metric, wrong: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(wrong, images)


def test_ssim_refuses_images_below_its_window() -> None:
    with pytest.raises(ValueError, match="8 x 16 pixels; SSIM needs 11 x 11"):
        ssim(np.zeros((1, 8, 16, 3)), np.zeros((1, 8, 16, 3)))


# ---- bootstrap


def test_mean_interval_matches_the_standard_error(rng: np.random.Generator) -> None:
    values = rng.normal(5.0, 2.0, size=400)
    interval = mean_interval(values)
    assert interval.value == pytest.approx(values.mean())
    error = values.std() / 20
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert interval == mean_interval(values)
    assert interval != mean_interval(values, seed=1)


def test_intervals_cover_and_shrink(rng: np.random.Generator) -> None:
    intervals = [mean_interval(rng.exponential(size=100), rounds=200) for _ in range(100)]
    assert 85 <= sum(interval.low <= 1.0 <= interval.high for interval in intervals) <= 100
    widths = []
    for count in (50, 200, 800):
        interval = mean_interval(rng.normal(size=count))
        widths.append(interval.high - interval.low)
    assert widths[0] > 1.5 * widths[1] > 1.5 * 1.5 * widths[2]
    narrow, wide = (mean_interval(rng.normal(size=50), level=level) for level in (0.5, 0.99))
    assert narrow.high - narrow.low < wide.high - wide.low


def test_difference_interval_uses_the_pairs(rng: np.random.Generator) -> None:
    b = rng.normal(scale=10.0, size=200)
    interval = difference_interval(b + 0.5 + rng.normal(scale=0.1, size=200), b)
    assert 0.45 < interval.low < 0.5 < interval.high < 0.55
    with pytest.raises(ValueError, match="expected equal"):
        difference_interval([1.0, 2.0], [1.0])


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_frechet_interval_holds_its_value(rng: np.random.Generator, shift: float) -> None:
    reference = gaussian(rng.normal(size=(4000, 16)))
    wide, narrow = (
        frechet_interval(rng.normal(size=(count, 16)) + shift, *reference, rounds=100) for count in (100, 800)
    )
    for interval in (wide, narrow):
        assert interval.low < interval.value < interval.high
    assert narrow.high - narrow.low < wide.high - wide.low


def test_images_that_do_not_differ_have_a_distance_of_zero_for_certain(rng: np.random.Generator) -> None:
    features = rng.normal(size=(64, 16))
    interval = frechet_interval(features, *gaussian(features), rounds=20)
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)


def test_paired_ratio_ranks_two_sets(rng: np.random.Generator) -> None:
    reference = rng.normal(size=(256, 16))
    noise = rng.normal(size=(256, 16))
    worse, better = reference + 0.6 * noise, reference + 0.3 * noise
    interval = paired_frechet_ratio(worse, better, reference, rounds=100)
    moments = gaussian(reference)
    distances = [frechet_distance(*gaussian(features), *moments) for features in (worse, better)]
    assert interval.value == pytest.approx(distances[0] / distances[1])
    assert 1 < interval.low < interval.value < interval.high
    assert paired_frechet_ratio(better, worse, reference, rounds=100).high < 1
    assert paired_frechet_ratio(better, better, reference, rounds=20) == Interval(1.0, 1.0, 1.0)


def test_paired_ratio_with_zero_distances(rng: np.random.Generator) -> None:
    reference = rng.normal(size=(64, 8))
    assert paired_frechet_ratio(reference, reference, reference, rounds=20) == Interval(1.0, 1.0, 1.0)
    assert paired_frechet_ratio(reference, reference + 1, reference, rounds=20) == Interval(0.0, 0.0, 0.0)
    infinite = paired_frechet_ratio(reference + 1, reference, reference, rounds=20)
    assert infinite == Interval(math.inf, math.inf, math.inf)
    assert json.dumps(infinite.to_dict(), allow_nan=False) == '{"value": null, "low": null, "high": null}'


def test_paired_difference_against_a_fixed_reference(rng: np.random.Generator) -> None:
    reference = gaussian(rng.normal(size=(4000, 16)))
    better = rng.normal(size=(256, 16))
    interval = paired_frechet_difference(better + 0.5, better, *reference, rounds=100)
    assert 0 < interval.low < interval.value < interval.high
    # A shift of 0.5 in 16 dimensions adds 4, and what the sample means add on either side.
    assert interval.low < 4.0 < interval.high
    assert paired_frechet_difference(better, better, *reference, rounds=20) == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([]),
        lambda: mean_interval([1.0, math.nan]),
        lambda: mean_interval([1.0], rounds=0),
        lambda: mean_interval([1.0], level=95),
        lambda: paired_frechet_ratio(np.eye(3), np.eye(3), np.ones((4, 3))),
        lambda: paired_frechet_difference(np.eye(3), np.ones((4, 3)), np.zeros(3), np.eye(3)),
    ],
)
def test_intervals_refuse(call) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()


# ---- reference file


@pytest.mark.parametrize("count", [50, 2100])
def test_reference_round_trip(tmp_path: Path, count: int) -> None:
    features = torch.rand(count, 64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "reference.safetensors"
    write_reference(path, features, {"test_accuracy": "0.9"})
    reference = read_reference(path)
    mean, covariance = gaussian(features)
    np.testing.assert_array_equal(reference.mean, mean)
    np.testing.assert_array_equal(reference.covariance, covariance)
    assert reference.mean.dtype == reference.covariance.dtype == np.float64
    assert reference.features.dtype == np.float32
    assert reference.metadata == {"test_accuracy": "0.9"}
    stored = {row.tobytes() for row in reference.features}
    given = {row.tobytes() for row in features.half().float().numpy()}
    assert len(stored) == len(reference.features) == min(count, 2000)
    assert stored <= given
    assert [entry.name for entry in tmp_path.iterdir()] == ["reference.safetensors"]
    write_reference(path, features)
    np.testing.assert_array_equal(read_reference(path).features, reference.features)
    assert read_reference(path).metadata == {}


def test_reference_write_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    write_reference(path, torch.rand(4, 64))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_reference(path, torch.rand(4, 64), {"images": 4})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="65504"):
        write_reference(path, torch.full((4, 64), 1e5))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_reference_refuses_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(FileNotFoundError):
        read_reference(path)
    save_file({"mean": np.zeros(4), "features": np.zeros((3, 4))}, path)
    with pytest.raises(ValueError, match="lacks covariance; expected the tensors mean, covariance, features$"):
        read_reference(path)
    save_file({"mean": np.zeros(4), "covariance": np.eye(5), "features": np.zeros((3, 4))}, path)
    with pytest.raises(ValueError, match=r"expected \[D\], \[D, D\] and \[M, D\]"):
        read_reference(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_reference(path)
