"""Image quality: distances between distributions of features, similarity of image pairs, and their uncertainty."""

from evaluation.metrics.bootstrap import (
    Interval,
    difference_interval,
    frechet_interval,
    kernel_interval,
    mean_interval,
    paired_frechet_difference,
    paired_frechet_ratio,
)
from evaluation.metrics.distribution import frechet_distance, gaussian, kernel_distance
from evaluation.metrics.features import FeatureNetwork
from evaluation.metrics.reference import Reference, read_reference, write_reference
from evaluation.metrics.similarity import psnr, ssim, worst_tenth

__all__ = [
    "FeatureNetwork",
    "Interval",
    "Reference",
    "difference_interval",
    "frechet_distance",
    "frechet_interval",
    "gaussian",
    "kernel_distance",
    "kernel_interval",
    "mean_interval",
    "paired_frechet_difference",
    "paired_frechet_ratio",
    "psnr",
    "read_reference",
    "ssim",
    "worst_tenth",
    "write_reference",
]
