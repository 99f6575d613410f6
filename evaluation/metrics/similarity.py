"""How close each image is to its own reference image: PSNR and SSIM."""

from __future__ import annotations

import numpy as np
from skimage.metrics import mean_squared_error, structural_similarity

# JSON has no infinity, so identical images read 100 dB.
SMALLEST_ERROR = 1e-10
WINDOW = 11


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio [N] in dB of float images [N, H, W, C] in [0, 1] against references alike.

    10 log10(1 / MSE). The mean squared error is floored at 1e-10, so identical images read 100 dB instead of infinity
    and nothing reads more. Raises ValueError if the shapes differ, N is 0, or values are not floats within [0, 1].
    """
    images, references = _checked(images, references)
    errors = [mean_squared_error(reference, image) for image, reference in zip(images, references, strict=True)]
    return -10.0 * np.log10(np.maximum(errors, SMALLEST_ERROR))


def ssim(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Structural similarity [N], at most 1, of float images [N, H, W, C] in [0, 1] against references alike.

    Wang et al. 2004 (IEEE Transactions on Image Processing 13, 600-612), equation 13, with that paper's 11 x 11
    Gaussian window of sigma 1.5, averaged over the channels. Raises ValueError as :func:`psnr` does, and if an image
    is smaller than the window.
    """
    images, references = _checked(images, references)
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(f"images are {images.shape[1]} x {images.shape[2]} pixels; SSIM needs {WINDOW} x {WINDOW}")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return np.array(
        [
            structural_similarity(reference, image, data_range=1.0, channel_axis=-1, **options)
            for image, reference in zip(images, references, strict=True)
        ]
    )


def worst_tenth(values: np.ndarray) -> float:
    """The mean of the lowest tenth of the values [N], of at least one: what a mean over all of them hides."""
    count = max(1, round(len(values) / 10))
    return float(np.sort(np.asarray(values, dtype=np.float64))[:count].mean())


def _checked(images: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, references = np.asarray(images), np.asarray(references)
    if images.shape != references.shape:
        raise ValueError(f"images have shape {images.shape} and references {references.shape}; expected equal")
    for array in (images, references):
        if array.ndim != 4 or array.size == 0 or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"images are {array.dtype} of shape {array.shape}; expected floats [N, H, W, C]")
        # Written so that NaN fails it too.
        if not (array.min() >= 0.0 and array.max() <= 1.0):
            raise ValueError(f"images span {array.min():g} to {array.max():g}; expected values within [0, 1]")
    return images.astype(np.float64), references.astype(np.float64)
