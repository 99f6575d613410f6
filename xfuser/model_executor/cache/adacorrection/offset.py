"""Offset Estimation Module (AdaCorrection, arXiv 2602.13357, equations 1 to 3), as sums that ranks can add."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# One row a unit: 8 float64 numbers, 64 bytes.
ROW = 8


def temporal_sum(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of ‖current − previous‖₂ (numerator of equation 1). Tensors have shape [B, P, D]."""
    return torch.linalg.vector_norm(current - previous, dim=-1, dtype=torch.float32).sum()


def spatial_sum(current: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of the population standard deviation over channels (numerator of equation 2)."""
    return torch.var(current.float(), dim=-1, correction=0).sqrt().sum()


def norm_sum(current: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of ‖current‖₂."""
    return torch.linalg.vector_norm(current, dim=-1, dtype=torch.float32).sum()


@dataclass(frozen=True)
class Sample:
    """Every stride-th token of one evaluation, input and residual [B, ceil(P / stride), D], and the inputs' Σ‖·‖₂."""

    inputs: torch.Tensor
    residual: torch.Tensor
    norm: torch.Tensor


def sample_tokens(inputs: torch.Tensor, outputs: torch.Tensor, stride: int) -> Sample:
    """Take every ``stride``-th token: enough to see drift and error, at a fraction of the memory traffic."""
    picked = inputs[:, ::stride].contiguous()
    return Sample(picked, outputs[:, ::stride] - picked, norm_sum(picked))


def offset_sums(current: Sample, history: list[Sample], weights: tuple[float, ...]) -> torch.Tensor:
    """One unit's sums of this evaluation, shape [8], in the order of `OffsetRow`.

    ``history`` are the samples of the remembered evaluations, newest first, and ``weights`` those of the stand-in that
    they would have given; with an empty history there is nothing to compare with, and the comparing sums are zero.
    """
    tokens = torch.full_like(current.norm, current.inputs.shape[0] * current.inputs.shape[1])
    spatial = spatial_sum(current.inputs)
    output_square = _square(current.inputs + current.residual)
    if not history:
        zero = torch.zeros_like(tokens)
        return torch.stack((tokens, zero, zero, spatial, output_square, zero, zero, zero))
    newest = history[0]
    missed = current.residual - newest.residual
    extrapolated = newest.residual * (weights[0] - 1)
    for weight, sample in zip(weights[1:], history[1:], strict=False):
        extrapolated.add_(sample.residual, alpha=weight)
    return torch.stack(
        (
            tokens,
            temporal_sum(current.inputs, newest.inputs),
            newest.norm,
            spatial,
            output_square,
            _square(missed),
            _dot(missed, extrapolated),
            _square(extrapolated),
        )
    )


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.float().flatten(), b.float().flatten())


def _square(a: torch.Tensor) -> torch.Tensor:
    return _dot(a, a)


@dataclass(frozen=True)
class OffsetRow:
    """One unit's reduced sums of one evaluation.

    Attributes:
        tokens: Tokens measured, counted over the batch.
        drift: Σ‖h − h_ref‖₂, h_ref the input at the unit's last evaluation.
        reference_norm: Σ‖h_ref‖₂.
        spatial: Σ of the standard deviation over channels of h.
        output_square: Σ‖output‖².
        reuse_square: Σ‖r − r_ref‖², the squared error that plain reuse would have had.
        cross: Σ (r − r_ref)·x, with x the extrapolating part of the stand-in.
        extrapolation_square: Σ‖x‖².
    """

    tokens: float
    drift: float
    reference_norm: float
    spatial: float
    output_square: float
    reuse_square: float
    cross: float
    extrapolation_square: float

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in vars(self).values())

    @property
    def temporal(self) -> float:
        """Δ_temp, the mean norm of the drift (equation 1)."""
        return self.drift / self.tokens

    @property
    def spatial_variation(self) -> float:
        """Δ_spatial (equation 2)."""
        return self.spatial / self.tokens

    @property
    def relative_drift(self) -> float:
        """D = Δ_temp / mean‖h_ref‖."""
        return self.drift / self.reference_norm if self.reference_norm > 0 else 0.0

    def error(self, weight: float) -> float:
        """Relative error ‖output − stand-in‖ / ‖output‖ of a stand-in with this correction weight."""
        if self.output_square <= 0:
            return 0.0
        square = self.reuse_square - 2 * weight * self.cross + weight**2 * self.extrapolation_square
        return math.sqrt(max(square, 0.0) / self.output_square)


def absolute_score(temporal: float, spatial: float, adacorr_lambda: float) -> float:
    """S = Δ_temp² + λ·Δ_spatial (equation 3)."""
    return temporal**2 + adacorr_lambda * spatial


def relative_score(
    relative_drift: float, spatial: float, reference_spatial: float, root_mean_square: float, adacorr_lambda: float
) -> float:
    """S = D² + λ·|Δ_spatial − Δ_spatial,ref| / rms(h_ref): without unit, and zero when nothing has moved."""
    change = abs(spatial - reference_spatial) / root_mean_square if root_mean_square > 0 else 0.0
    return relative_drift**2 + adacorr_lambda * change
