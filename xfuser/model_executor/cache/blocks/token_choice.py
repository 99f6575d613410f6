"""The token view: which tokens of a stream are evaluated, and how the others are put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class TokenChoice:
    """Tokens of a stream [B, P, D] that are to be evaluated: as many in every image, each image its own.

    Attributes:
        places: Their positions, ascending, shape [B, k].
        tokens: P, the number of tokens in all.
        text: Tokens of other streams, all of which are evaluated along.
    """

    places: torch.Tensor
    tokens: int
    text: int = 0

    @property
    def share(self) -> float:
        """The share of all tokens, those of other streams among them, that is evaluated: 0 where no image token is."""
        if self.places.shape[1] == 0:
            return 0.0
        return (self.places.shape[1] + self.text) / (self.tokens + self.text)

    @classmethod
    def wanted(cls, wanted: torch.Tensor, priority: torch.Tensor, text: int = 0) -> TokenChoice:
        """The tokens wanted ([B, P] of booleans), filled up by priority [B, P] to the count of the busiest image."""
        count = int(wanted.sum(1).max())
        order = torch.where(wanted, torch.inf, priority).topk(count, dim=1).indices
        return cls(order.sort(dim=1).values, wanted.shape[1], text)

    @classmethod
    def moving(
        cls, current: torch.Tensor, previous: torch.Tensor | None, threshold: float, text: int = 0
    ) -> TokenChoice | None:
        """FastCache's choice: ‖X_t[i] − X_{t−1}[i]‖² ≥ threshold × the image's largest; ``None`` where all move."""
        if previous is None or previous.shape != current.shape:
            return None
        saliency = torch.linalg.vector_norm(current - previous, dim=-1, dtype=torch.float32).square()
        choice = cls.wanted(saliency >= threshold * saliency.amax(1, keepdim=True), saliency, text)
        return None if choice.share >= 1 else choice

    def shared(self) -> TokenChoice:
        """The same tokens for every image, each that any image needs: for blocks whose per-token arguments are."""
        needed = torch.zeros(self.tokens, dtype=torch.bool, device=self.places.device)
        needed[self.places.flatten()] = True
        places = needed.nonzero().flatten()
        return TokenChoice(places.expand(len(self.places), -1), self.tokens, self.text)

    def take(self, stream: torch.Tensor) -> torch.Tensor:
        """The chosen tokens of [B, P, D], shape [B, k, D]."""
        return stream.gather(1, self._index(stream))

    def put(self, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """A copy of [B, P, D] with the chosen tokens [B, k, D] in their places."""
        return stream.scatter(1, self._index(stream), chosen)

    def _index(self, stream: torch.Tensor) -> torch.Tensor:
        return self.places[:, :, None].expand(-1, -1, stream.shape[-1])
