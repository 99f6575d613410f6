"""The reference file: the moments of the features of real images, and a subset of those features."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from evaluation.metrics.distribution import gaussian

SUBSET_SIZE = 2000
SUBSET_SEED = 0
TENSORS = ("mean", "covariance", "features")


@dataclass(frozen=True, eq=False)
class Reference:
    """What generated images are compared to.

    ``mean`` [D] and ``covariance`` [D, D] (float64, unbiased) describe all N images and serve the FID; ``features``
    [M, D] (float32, stored in half precision) are a random subset of M = min(N, 2000) and serve the KID.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray
    metadata: dict[str, str]


def write_reference(path: str | Path, features: Tensor, metadata: dict[str, str] | None = None) -> None:
    """Write the reference file (safetensors) of features [N, D]; a reader never sees it half written.

    The subset is drawn with a fixed seed, so equal features give equal tensors. Raises ValueError if N is below 2,
    or if a feature is not finite or exceeds half precision (65504).
    """
    path = Path(path)
    values = features.detach().cpu().double().numpy()
    mean, covariance = gaussian(values)
    if np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"features reach {np.abs(values).max():g}; expected at most 65504, the end of half precision")
    chosen = np.random.default_rng(SUBSET_SEED).permutation(len(values))[:SUBSET_SIZE]
    tensors = {"mean": mean, "covariance": covariance, "features": values[chosen].astype(np.float16)}
    # A rename is atomic only within one file system, hence the same folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_reference(path: str | Path) -> Reference:
    """Read a reference file written by :func:`write_reference`.

    Raises FileNotFoundError if there is none, ValueError if it is no safetensors file, lacks a tensor, or holds
    tensors whose shapes disagree.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            missing = [name for name in TENSORS if name not in file.keys()]
            if missing:
                raise ValueError(f"{path} lacks {', '.join(missing)}; expected the tensors {', '.join(TENSORS)}")
            mean, covariance, features = (file.get_tensor(name) for name in TENSORS)
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if mean.ndim != 1 or covariance.shape != mean.shape * 2 or features.ndim != 2 or features.shape[1:] != mean.shape:
        shapes = f"mean {mean.shape}, covariance {covariance.shape}, features {features.shape}"
        raise ValueError(f"{path} holds {shapes}; expected [D], [D, D] and [M, D]")
    return Reference(mean.astype(np.float64), covariance.astype(np.float64), features.astype(np.float32), metadata)
