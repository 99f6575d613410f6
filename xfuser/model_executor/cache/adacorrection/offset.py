"""Offset Estimation Module (AdaCorrection, arXiv 2602.13357, equations 1 to 3), as sums that ranks can add."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# One row a unit: 8 float64 numbers, 64 bytes.
ROW = 8
DRIFT = 5  # numbers that `drift_sums` tells


_TOKENS = (-2, -1)


def temporal_sum(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of ‖current − previous‖₂ (numerator of equation 1). Tensors have shape [..., B, P, D]."""
    return torch.linalg.vector_norm(current - previous, dim=-1, dtype=torch.float32).sum(_TOKENS)


def spatial_sum(current: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of the population standard deviation over channels (numerator of equation 2)."""
    return torch.var(current.float(), dim=-1, correction=0).sqrt().sum(_TOKENS)


def norm_sum(current: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of ‖current‖₂."""
    return torch.linalg.vector_norm(current, dim=-1, dtype=torch.float32).sum(_TOKENS)


def drift_sums(current: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    """What the offset score needs of an input that is not evaluated (yet), shape [5]: tokens, Σ‖h − h_ref‖₂, Σ‖h_ref‖₂,
    and Σ of the standard deviation over channels of h and of h_ref; zeros without a reference of the same shape.
    """
    if reference is None or reference.shape != current.shape:
        return torch.zeros(DRIFT, device=current.device)
    both = torch.stack((current, reference))
    spatial, norms = spatial_sum(both), norm_sum(both)
    tokens = torch.full_like(norms[0], current.shape[0] * current.shape[1])
    return torch.stack((tokens, temporal_sum(current, reference), norms[1], *spatial))


def offset_sums(
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    history: list[tuple[torch.Tensor, torch.Tensor]],
    lower: torch.Tensor,
    full: torch.Tensor,
) -> torch.Tensor:
    """The sums of several rows' evaluations at one step, shape [R, 8], in the order of `OffsetRow`.

    ``inputs`` and ``outputs`` have shape [R, B, P, D]. ``history`` are inputs and residuals of the remembered
    evaluations, shaped alike, newest first; ``full`` and ``lower`` the weights, of shape [R, nodes, 1, 1, 1], of the
    stand-in that they would have given with what the correction weight scales and without. With an empty history there
    is nothing to compare with, and the comparing sums are zero.
    """
    rows, batch, count, _ = inputs.shape
    tokens = inputs.new_full((rows,), float(batch * count))
    zero = torch.zeros_like(tokens)
    drift, norm, missed_square, cross, highest_square = (zero,) * 5
    if history:
        newest, _ = history[0]
        remembered = torch.stack([residuals for _, residuals in history[: lower.shape[1]]], dim=1)
        missed = outputs - inputs - (remembered * lower).sum(1)
        highest = (remembered * (full - lower)).sum(1)
        drift, norm = temporal_sum(inputs, newest), norm_sum(newest)
        missed_square, highest_square = _square(missed), _square(highest)
        cross = (missed * highest).flatten(1).sum(1)
    columns = (
        tokens,
        drift,
        norm,
        spatial_sum(inputs),
        _square(outputs),
        missed_square,
        cross,
        highest_square,
    )
    return torch.stack(columns, dim=1)


def _square(a: torch.Tensor) -> torch.Tensor:
    """Σ a² of every row, shape [R]."""
    return torch.linalg.vector_norm(a.flatten(1), dim=1).square()


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
