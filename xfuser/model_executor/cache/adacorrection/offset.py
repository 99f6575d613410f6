"""Offset Estimation Module (AdaCorrection, arXiv 2602.13357, equations 1 to 3), as sums that ranks can add."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# One row a unit: 8 float64 numbers, 64 bytes.
ROW = 8
DRIFT = 5  # numbers that `drift_sums` tells


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
    """Every stride-th token of one evaluation, [B, ceil(P / stride), D], and two sums over its inputs."""

    inputs: torch.Tensor
    residual: torch.Tensor
    norm: torch.Tensor
    spatial: torch.Tensor


def sample_tokens(inputs: torch.Tensor, outputs: torch.Tensor, stride: int) -> Sample:
    """Take every ``stride``-th token: enough to see drift and error, at a fraction of the memory traffic."""
    picked = inputs[:, ::stride].contiguous()
    return Sample(picked, outputs[:, ::stride] - picked, norm_sum(picked), spatial_sum(picked))


def drift_sums(inputs: torch.Tensor, reference: Sample | None, stride: int) -> torch.Tensor:
    """What the offset score needs of an input that is not evaluated (yet), shape [5]: tokens, Σ‖h − h_ref‖₂, Σ‖h_ref‖₂,
    and Σ of the standard deviation over channels of h and of h_ref; zeros without a reference of the same shape.
    """
    picked = inputs[:, ::stride]
    if reference is None or reference.inputs.shape != picked.shape:
        return torch.zeros(5, device=inputs.device)
    tokens = torch.full_like(reference.norm, picked.shape[0] * picked.shape[1])
    drift = temporal_sum(picked, reference.inputs)
    return torch.stack((tokens, drift, reference.norm, spatial_sum(picked), reference.spatial))


def offset_sums(
    current: Sample, history: list[Sample], lower: tuple[float, ...], full: tuple[float, ...]
) -> torch.Tensor:
    """One unit's sums of this evaluation, shape [8], in the order of `OffsetRow`.

    ``history`` are the samples of the remembered evaluations, newest first; ``full`` and ``lower`` the weights of the
    stand-in that they would have given with its highest term and without. With an empty history there is nothing to
    compare with, and the comparing sums are zero.
    """
    tokens = torch.full_like(current.norm, current.inputs.shape[0] * current.inputs.shape[1])
    spatial = current.spatial
    output_square = _square(current.inputs + current.residual)
    if not history:
        zero = torch.zeros_like(tokens)
        return torch.stack((tokens, zero, zero, spatial, output_square, zero, zero, zero))
    missed = current.residual.clone()
    highest = torch.zeros_like(missed)
    for low, high, sample in zip(lower, full, history, strict=True):
        missed.sub_(sample.residual, alpha=low)
        highest.add_(sample.residual, alpha=high - low)
    newest = history[0]
    return torch.stack(
        (
            tokens,
            temporal_sum(current.inputs, newest.inputs),
            newest.norm,
            spatial,
            output_square,
            _square(missed),
            _dot(missed, highest),
            _square(highest),
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
        missed_square: Σ‖r − r̂‖², r̂ the stand-in's residual without its highest term x.
        cross: Σ (r − r̂)·x.
        highest_square: Σ‖x‖².
    """

    tokens: float
    drift: float
    reference_norm: float
    spatial: float
    output_square: float
    missed_square: float
    cross: float
    highest_square: float

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in vars(self).values())

    def error(self, weight: float) -> float:
        """Relative error ‖output − stand-in‖ / ‖output‖ of a stand-in with this correction weight."""
        if self.output_square <= 0:
            return 0.0
        square = self.missed_square - 2 * weight * self.cross + weight**2 * self.highest_square
        return math.sqrt(max(square, 0.0) / self.output_square)


@dataclass(frozen=True)
class OffsetScore:
    """Turns reduced sums into the offset score S (equation 3), as the settings ask for it.

    ``absolute``: S = Δ_temp² + λ·Δ_spatial, as published. ``relative``: S = D² + λ·|Δ_spatial − Δ_spatial,ref| /
    rms(h_ref) with D = Δ_temp / mean‖h_ref‖, without unit and zero when nothing has moved, so that one γ serves models
    of any width.
    """

    kind: str
    adacorr_lambda: float

    def __call__(
        self,
        tokens: float,
        drift: float,
        reference_norm: float,
        spatial: float,
        reference_spatial: float,
        channels: int,
    ) -> float:
        """S from sums over ``tokens`` tokens of ``channels`` channels; NaN where they are not finite."""
        if tokens <= 0 or not math.isfinite(drift + reference_norm + spatial):
            return math.nan
        variation = spatial / tokens
        if self.kind == "absolute":
            return (drift / tokens) ** 2 + self.adacorr_lambda * variation
        if reference_norm <= 0:
            return 0.0
        root_mean_square = reference_norm / tokens / math.sqrt(channels)
        change = abs(variation - reference_spatial / tokens) / root_mean_square
        return (drift / reference_norm) ** 2 + self.adacorr_lambda * change
