"""Learn one step's correction weights by least squares, shrunk towards the plain forecast as images disagree.

The unknowns are the weights w of x_{i+1} = step(output, x_i) + Σ_k w_k F_k. Every image (or, where only one is known,
every part of it) adds its own normal equations, so images that come later simply join, and how well weights learned
from some of them serve the others is known without another model call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)
PARTS = 4  # of a single image, in place of several images
SINGLE_IMAGE_RIDGE = 1e-3


@dataclass
class NormalEquations:
    """Σ F Fᵀ and Σ F r of every group, r what the plain step lacks of the recorded latent.

    Attributes:
        inner: [groups, features, features], float64.
        target: [groups, features].
        size: Σ r² of every group, [groups].
        images: How many images the groups are from; 1 where they are parts of one.
    """

    inner: torch.Tensor
    target: torch.Tensor
    size: torch.Tensor
    images: int

    @classmethod
    def of(cls, features: torch.Tensor, residual: torch.Tensor) -> NormalEquations:
        """Compute them from one batch.

        Args:
            features: [K, B, …].
            residual: [B, …].
        """
        images = residual.shape[0]
        features, residual = features.detach().float(), residual.detach().float()
        if images == 1:
            features, residual = _parts(features[:, 0]), _parts(residual[0][None])[0]
        columns = features.flatten(2).transpose(0, 1)  # groups, K, elements
        values = residual.flatten(1)
        inner = torch.einsum("gke,gle->gkl", columns, columns)
        target = torch.einsum("gke,ge->gk", columns, values)
        size = values.square().sum(dim=1)
        return cls(*(each.cpu().double() for each in (inner, target, size)), images)

    def join(self, other: NormalEquations | None) -> NormalEquations:
        """Add other images' groups."""
        if other is None:
            return self
        inner, target, size = (
            torch.cat([getattr(other, name), getattr(self, name)]) for name in ("inner", "target", "size")
        )
        return NormalEquations(inner, target, size, self.images + other.images)

    def solve(self, differences: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Find the weights.

        The ridge is chosen, and the whole scaled, so that weights learned without a group serve that group best. It
        acts on ``differences`` of outputs, since what a smooth trajectory needs (their slope and bend) is alike for all
        images, while weights of the outputs themselves are not.

        Args:
            differences: [K, K]; its rows make the level, slope and bend of the outputs from the features.

        Returns:
            The weights [K], and the shrinkage: 1 for none, 0 where the plain forecast is best.
        """
        inner = differences @ self.inner @ differences.T
        target = self.target @ differences.T
        total = inner.sum(0)
        least = SINGLE_IMAGE_RIDGE if self.images == 1 else RIDGES[0]
        ridges = torch.tensor([each for each in RIDGES if each >= least], dtype=torch.float64)
        if len(inner) == 1:
            return differences.T @ _ridge(total, target.sum(0), ridges[:1])[0], 1.0
        others = total - inner
        without = _ridge(others, target.sum(0) - target, ridges)  # groups, ridges, K
        gain = torch.einsum("grk,gk->gr", without, target)
        spent = torch.einsum("grk,gkl,grl->gr", without, inner, without)
        gain, spent = gain.sum(0), spent.sum(0)
        scale = (gain / spent.clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1)
        loss = scale.square() * spent - 2 * scale * gain
        best = int(torch.argmin(loss))
        if not bool(torch.isfinite(loss[best])) or float(loss[best]) >= 0:
            return torch.zeros(len(total), dtype=torch.float64), 0.0
        weights = _ridge(total, target.sum(0), ridges[best : best + 1])[0] * scale[best]
        return differences.T @ weights, float(scale[best])


def difference_basis(branches: list[int]) -> torch.Tensor:
    """Make the matrix from features to differences.

    Args:
        branches: How many remembered outputs each branch has, newest first; the latent follows as the last feature.
    """
    size = sum(branches) + 1
    basis = torch.eye(size, dtype=torch.float64)
    start = 0
    for count in branches:
        if count >= 2:
            basis[start + 1, start : start + 2] = torch.tensor([1.0, -1.0], dtype=torch.float64)
        if count >= 3:
            basis[start + 2, start : start + 3] = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
        start += count
    return basis


def _ridge(inner: torch.Tensor, target: torch.Tensor, ridges: torch.Tensor) -> torch.Tensor:
    """Solve for every ridge, a share of each unknown's own size: [..., R, K]."""
    diagonal = inner.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float64).tiny)
    scale = diagonal.rsqrt()
    unit = inner * scale[..., None, :] * scale[..., :, None]
    system = unit[..., None, :, :] + ridges[:, None, None] * torch.eye(inner.shape[-1], dtype=inner.dtype)
    right = (target * scale)[..., None, :, None].expand(*system.shape[:-1], 1)
    return torch.linalg.solve(system, right)[..., 0] * scale[..., None, :]


def _parts(tensor: torch.Tensor) -> torch.Tensor:
    """Cut one image [K, …] into parts along its longest dimension: [K, parts, …]."""
    dim = 1 + max(range(tensor.ndim - 1), key=lambda index: tensor.shape[index + 1])
    length = tensor.shape[dim] // PARTS
    if length == 0:
        return tensor[:, None]
    cut = tensor.narrow(dim, 0, length * PARTS).unflatten(dim, (PARTS, length))
    return cut.movedim(dim, 1)
