"""The small image-text matcher: it reads an image and ranks the captions that it knows by how well they fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

IMAGE_SIZE = 64
EMBEDDING_DIM = 64


class _Residual(nn.Module):
    """One normalised convolution around which the input is carried."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = _convolution(channels, channels, 3, 1, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.layers(hidden_states)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class ImageTextMatcher(nn.Module):
    """Convolutional image encoder and a table of caption embeddings, in one space.

    ``forward`` takes images of shape [N, 3, H, W] in [0, 1] (any size, resized to 64 x 64) and returns embeddings of
    length 1, shape [N, 64]. ``table`` has shape [M, 64]: one row for each of the M ``captions``, trained
    contrastively by a text encoder (as CLIP, arXiv 2103.00020), which is not needed to judge.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        super().__init__()
        self.captions = list(captions)
        self.numbers = {caption: number for number, caption in enumerate(self.captions)}
        self.features = nn.Sequential(
            _convolution(3, 64, 8, 4, 2),
            _Residual(64),
            _convolution(64, 96, 3, 2, 1),
            _Residual(96),
            _convolution(96, 160, 3, 2, 1),
            _Residual(160),
            # Halves, not one mean: where things are tells emoji apart.
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.embed = nn.Sequential(nn.Linear(160 * 4, EMBEDDING_DIM), nn.BatchNorm1d(EMBEDDING_DIM))
        self.register_buffer("table", torch.zeros(len(self.captions), EMBEDDING_DIM))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, 3, H, W] in [0, 1]")
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        # White, the ground of all emoji, becomes zero, as the padding of the convolutions.
        return F.normalize(self.embed(self.features(2 - 2 * images)), dim=1)

    @torch.no_grad()
    def ranks(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Rank each image's own caption among all, 0 for the one that fits best.

        Args:
            images: [N, 3, H, W] in [0, 1].
            captions: N of the matcher's captions.

        Returns:
            Ranks, int64 [N].

        Raises:
            ValueError: A caption is not among the matcher's.
        """
        unknown = [caption for caption in captions if caption not in self.numbers]
        if unknown:
            raise ValueError(f"the matcher does not know {unknown[0]!r}; its captions are the attribute 'captions'")
        likeness = torch.cat([self(batch) for batch in images.split(256)]) @ self.table.T
        own = likeness.gather(1, torch.tensor([[self.numbers[caption]] for caption in captions]))
        return (likeness > own).sum(1)

    def save(self, path: str | Path) -> None:
        """Write weights (half precision) and captions into one safetensors file."""
        weights = {
            name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(weights, path, metadata={"captions": json.dumps(self.captions)})

    @classmethod
    def load(cls, path: str | Path) -> ImageTextMatcher:
        """Read what `save` wrote and return the matcher in evaluation mode."""
        with safe_open(path, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            captions = json.loads(opened.metadata()["captions"])
        matcher = cls(captions)
        matcher.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        return matcher.eval().requires_grad_(False)
