"""Distances between two sets of features: the Fréchet distance (FID) and the kernel distance (KID)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Moments:
    """What the Fréchet distance needs of one Gaussian, so that a fixed one is factored only once.

    ``mean`` has shape [D], ``root`` is the symmetric square root of the covariance [D, D], ``trace`` the covariance's.
    """

    mean: np.ndarray
    root: np.ndarray
    trace: float

    @classmethod
    def of(cls, mean: ArrayLike, covariance: ArrayLike) -> Moments:
        """Factor a covariance [D, D]; ValueError if the shapes disagree or a number is not finite."""
        mean, covariance = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(f"mean {mean.shape} and covariance {covariance.shape} disagree; expected [D] and [D, D]")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mean or covariance holds NaN or infinity; expected finite numbers")
        values, vectors = np.linalg.eigh(covariance)
        # A dead feature's eigenvalue is rounding noise of 1e-16, but its root would be 1e-8: cut before the root.
        values = np.where(values > len(mean) * EPSILON * values[-1], values, 0.0)
        return cls(mean, (vectors * np.sqrt(values)) @ vectors.T, float(np.trace(covariance)))

    def distance(self, other: Moments) -> float:
        """The squared Fréchet distance to another Gaussian of the same D, see :func:`frechet_distance`."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"the Gaussians have {len(self.mean)} and {len(other.mean)} dimensions; expected equal")
        # tr (A B)^(1/2) is the nuclear norm of A^(1/2) B^(1/2), whose singular values need no root of rounding noise.
        overlap = np.linalg.svd(self.root @ other.root, compute_uv=False).sum()
        distance = np.square(self.mean - other.mean).sum() + self.trace + other.trace - 2.0 * overlap
        noise = len(self.mean) * EPSILON * (self.trace + other.trace)
        return float(distance) if distance > noise else 0.0


def gaussian(features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], in float64.

    Raises ValueError for another shape, fewer than two rows, or NaN or infinity among the features.
    """
    features = as_features(features)
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean_a: ArrayLike, covariance_a: ArrayLike, mean_b: ArrayLike, covariance_b: ArrayLike) -> float:
    """Squared Fréchet distance between two Gaussians (the FID where they were fitted to features).

    |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), Heusel et al. 2017 (arXiv:1706.08500), equation 6. The means have
    shape [D], the covariances [D, D]; the unit is that of the squared features. What is below the rounding error of
    the traces (relative 2e-16 times D) reads exactly 0. Raises ValueError if shapes disagree or a number is not finite.
    """
    return Moments.of(mean_a, covariance_a).distance(Moments.of(mean_b, covariance_b))


def kernel_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Kernel distance (KID) between features [N, D] and [M, D]: 0 on average for equal distributions, can be negative.

    The unbiased estimate of the squared maximum mean discrepancy with kernel (x.y / D + 1)^3, Binkowski et al. 2018
    (arXiv:1801.01401), section 4; Gretton et al. 2012, equation 3. All pairs are taken at once, without blocks.
    Raises ValueError if D differs, a set has fewer than two rows, or a number is not finite.
    """
    features_a, features_b = as_features(features_a), as_features(features_b)
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"features have {features_a.shape[1]} and {features_b.shape[1]} columns; expected equal")
    cross = _polynomial_kernel(features_a, features_b).mean()
    return float(_mean_off_diagonal(features_a) + _mean_off_diagonal(features_b) - 2.0 * cross)


def kernel_distances_without_each(features: ArrayLike, reference: ArrayLike) -> tuple[float, np.ndarray]:
    """The kernel distance of features [N, D] to reference features [M, D], and [N] those without each row in turn.

    What the N left-out distances scatter by tells how far chance moves the estimate (the jackknife). Raises ValueError
    as :func:`kernel_distance` does, and where N is below 3.
    """
    features, reference = as_features(features), as_features(reference)
    count = len(features)
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features have {features.shape[1]} and {reference.shape[1]} columns; expected equal")
    if count < 3:
        raise ValueError(f"features have {count} rows; leaving each out needs 3")
    kernel = _polynomial_kernel(features, features)
    np.fill_diagonal(kernel, 0.0)
    rows, total = kernel.sum(axis=1), kernel.sum()
    cross = _polynomial_kernel(features, reference).mean(axis=1)
    theirs = _mean_off_diagonal(reference)
    whole = total / (count * (count - 1)) + theirs - 2.0 * cross.mean()
    without = (total - 2.0 * rows) / ((count - 1) * (count - 2)) + theirs - 2.0 * (cross.sum() - cross) / (count - 1)
    return float(whole), without


def as_features(features: ArrayLike) -> np.ndarray:
    """Features as a float64 array [N, D]; ValueError unless N is at least 2 and every number is finite."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {features.shape}; expected [N, D] with N at least 2")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity; expected finite numbers")
    return features


def _polynomial_kernel(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    base = rows @ columns.T / rows.shape[1] + 1.0
    # numpy's general power is many times slower than two products.
    return base * base * base


def _mean_off_diagonal(features: np.ndarray) -> float:
    kernel = _polynomial_kernel(features, features)
    return (kernel.sum() - np.trace(kernel)) / (len(features) * (len(features) - 1))
