"""Adaptive Correction Module (AdaCorrection, arXiv 2602.13357, equations 4 and 5): the published blend."""

from __future__ import annotations

import torch

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection.offset import norm_sum, spatial_sum, temporal_sum


def correction_weight(score: float, gamma: float) -> float:
    """w = clip(γ·S, 0, 1) (equation 4). A score that is not a number gives 1: only the fresh output is safe."""
    weight = gamma * score
    return min(max(weight, 0.0), 1.0) if weight == weight else 1.0


def blend(cached: Streams, fresh: Streams, weight: float) -> Streams:
    """(1 − w)·cached + w·fresh (equation 5), stream by stream."""
    if weight >= 1.0:
        return fresh
    return tuple((1.0 - weight) * old + weight * new for old, new in zip(cached, fresh, strict=True))


def blend_sums(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """What the blend's score needs of one unit, shape [4]: tokens, Σ drift, Σ spatial, Σ‖previous‖₂."""
    tokens = current.new_tensor(float(current.shape[0] * current.shape[1]), dtype=torch.float32)
    return torch.stack((tokens, temporal_sum(current, previous), spatial_sum(current), norm_sum(previous)))
