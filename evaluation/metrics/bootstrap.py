"""Bootstrap percentile intervals (Efron 1979): over images, and paired where two sets share their seeds.

The kernel distance is the exception: its pairs of one image with itself, which a resample makes, are no pairs of two
images, so that its interval comes from leaving out each image in turn.

The Fréchet distance needs one correction. A resample repeats images, so its distance is too large, and near zero a
plain percentile interval lies wholly above the value measured. The replicates of a distance or of a ratio of distances
are therefore scaled so that their median is that value; the interval is then of the distance at N images, and 0 where
the sets do not differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from evaluation.metrics.distribution import Moments, as_features, gaussian, kernel_distances_without_each


@dataclass(frozen=True)
class Interval:
    """A value measured on the whole sample, with the ends of its bootstrap interval, in the value's unit."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """The three numbers by name; None stands for one that is not finite, which JSON cannot hold."""
        return {name: number if math.isfinite(number) else None for name, number in asdict(self).items()}


def mean_interval(values: ArrayLike, seed: int = 0, rounds: int = 1000, level: float = 0.95) -> Interval:
    """Interval of the mean of values [N].

    Raises ValueError for another shape, no values, a number that is not finite, ``rounds`` below 1 or ``level``
    outside (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values have shape {values.shape}; expected [N] with N at least 1")
    if not np.isfinite(values).all():
        raise ValueError("values hold NaN or infinity; expected finite numbers")
    return _interval(lambda indices: float(values[indices].mean()), len(values), seed, rounds, level)


def difference_interval(a: ArrayLike, b: ArrayLike, seed: int = 0, rounds: int = 1000, level: float = 0.95) -> Interval:
    """Interval of the mean of a - b for paired values, both [N]: pair i comes from the same image.

    Raises ValueError if the shapes differ, and as :func:`mean_interval` does.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    _check_paired(a, b)
    return mean_interval(a - b, seed, rounds, level)


def frechet_interval(
    features: ArrayLike,
    reference_mean: ArrayLike,
    reference_covariance: ArrayLike,
    seed: int = 0,
    rounds: int = 300,
    level: float = 0.95,
) -> Interval:
    """Interval of the Fréchet distance from features [N, D] to a fixed Gaussian, mean [D] and covariance [D, D].

    The replicates are scaled to the value measured (see the module). Raises ValueError as
    :func:`~evaluation.metrics.distribution.frechet_distance` and :func:`mean_interval` do.
    """
    features = as_features(features)
    reference = Moments.of(reference_mean, reference_covariance)

    def distance(indices: np.ndarray) -> float:
        return _moments(features, indices).distance(reference)

    return _interval(distance, len(features), seed, rounds, level, scaled=True)


def kernel_interval(features: ArrayLike, reference: ArrayLike, level: float = 0.95) -> Interval:
    """Interval of the kernel distance (KID) from features [N, D] to fixed reference features [M, D].

    The jackknife's (Efron and Stein 1981), normal and symmetric; where the distance is 0 it is too wide rather than too
    narrow. An interval that holds 0 says that chance alone explains the value. Raises ValueError as
    :func:`~evaluation.metrics.distribution.kernel_distances_without_each` does, and for ``level`` outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; expected within (0, 1)")
    value, without = kernel_distances_without_each(features, reference)
    count = len(without)
    error = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    return Interval(value, value - reach, value + reach)


def paired_frechet_ratio(
    features_a: ArrayLike,
    features_b: ArrayLike,
    features_reference: ArrayLike,
    seed: int = 0,
    rounds: int = 300,
    level: float = 0.95,
) -> Interval:
    """Interval of FD(a, reference) / FD(b, reference) for features [N, D] whose row i has the same seed in all three.

    All three are resampled with the same rows; the replicates are scaled to the value measured (see the module).
    0 / 0 is 1 (the sets are equally good) and x / 0 is infinite. Raises ValueError if the shapes differ, and as
    :func:`frechet_interval` does.
    """
    features_a, features_b, reference = (as_features(x) for x in (features_a, features_b, features_reference))
    _check_paired(features_a, features_b, reference)

    def ratio(indices: np.ndarray) -> float:
        moments = _moments(reference, indices)
        numerator = _moments(features_a, indices).distance(moments)
        denominator = _moments(features_b, indices).distance(moments)
        if denominator == 0.0:
            return 1.0 if numerator == 0.0 else math.inf
        return numerator / denominator

    return _interval(ratio, len(reference), seed, rounds, level, scaled=True)


def paired_frechet_difference(
    features_a: ArrayLike,
    features_b: ArrayLike,
    mean: ArrayLike,
    covariance: ArrayLike,
    seed: int = 0,
    rounds: int = 300,
    level: float = 0.95,
) -> Interval:
    """Interval of FD(a, reference) - FD(b, reference) against a fixed Gaussian, mean [D] and covariance [D, D].

    ``features_a`` and ``features_b`` have shape [N, D], row i of both has the same seed and is resampled together.
    The replicates are not scaled: what resampling adds to both distances largely cancels. Raises ValueError if the
    shapes differ, and as :func:`frechet_interval` does.
    """
    features_a, features_b = as_features(features_a), as_features(features_b)
    _check_paired(features_a, features_b)
    reference = Moments.of(mean, covariance)

    def difference(indices: np.ndarray) -> float:
        return _moments(features_a, indices).distance(reference) - _moments(features_b, indices).distance(reference)

    return _interval(difference, len(features_a), seed, rounds, level)


def _interval(
    statistic: Callable[[np.ndarray], float], size: int, seed: int, rounds: int, level: float, scaled: bool = False
) -> Interval:
    if rounds < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"rounds is {rounds} and level {level}; expected rounds of at least 1, level within (0, 1)")
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(size))
    replicates = np.array([statistic(rng.integers(size, size=size)) for _ in range(rounds)])
    # Interpolating between two infinite ratios would give NaN, hence ends that are replicates themselves.
    middle = float(np.quantile(replicates, 0.5, method="lower"))
    low = float(np.quantile(replicates, (1 - level) / 2, method="lower"))
    high = float(np.quantile(replicates, (1 + level) / 2, method="higher"))
    if scaled and 0.0 < middle < math.inf and 0.0 <= value < math.inf:
        low, high = low * value / middle, high * value / middle
    return Interval(value, low, high)


def _moments(features: np.ndarray, indices: np.ndarray) -> Moments:
    return Moments.of(*gaussian(features[indices]))


def _check_paired(first: np.ndarray, *others: np.ndarray) -> None:
    for other in others:
        if other.shape != first.shape:
            raise ValueError(f"paired arrays have shapes {first.shape} and {other.shape}; expected equal")
