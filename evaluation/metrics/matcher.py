"""The image-text matcher: it reads an image and ranks the captions that it knows by how well they fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from evaluation.metrics.colour import CHANNELS, ColourFeatures

IMAGE_SIZE = 160  # pixels that the network reads: 64 enlarged to 224 say no more and cost twice the time
PLACES = 3  # parts of an image's height and width: where things are tells emoji apart
FEATURES = CHANNELS * PLACES**2
EMBEDDING_DIM = 128
RIDGE = 0.1  # of the mean variance between images of one caption, added to each feature's


class ImageTextMatcher:
    """Public features of an image, projected so that images of one caption are alike, and a table of captions.

    Calling it takes images of shape [N, 3, H, W] in [0, 1] and returns embeddings of length 1, shape [N, 128]. The
    features are EfficientNet-Lite0's (`ColourFeatures`) at 3 x 3 places; the projection is Fisher's linear discriminant
    analysis, learned by `fit`. ``table`` has shape [M, 128], one row for each of the M ``captions``: the mean of its
    images. Text that is no caption cannot be judged.

    Raises:
        ModuleNotFoundError: The packages with the network are missing.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        self.captions = list(captions)
        self.numbers = {caption: number for number, caption in enumerate(self.captions)}
        self.projection = torch.zeros(FEATURES, EMBEDDING_DIM)
        self.offset = torch.zeros(EMBEDDING_DIM)
        self.table = torch.zeros(len(self.captions), EMBEDDING_DIM)
        self._network = ColourFeatures.load()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute what the projection reads, [N, 1008], of images [N, 3, H, W] in [0, 1]."""
        batches = [
            F.adaptive_avg_pool2d(self._network.maps(batch, IMAGE_SIZE), PLACES).flatten(1)
            for batch in images.split(64)
        ]
        return torch.cat(batches)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self._embedded(self.features(images))

    def _embedded(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features @ self.projection - self.offset, dim=1)

    def fit(self, features: torch.Tensor, captions: Sequence[str]) -> None:
        """Learn the projection from pairs of images of one caption, and the table from all images.

        Args:
            features: What `features` returns of N images.
            captions: N of the matcher's captions; some of them twice, each of them once at least.

        Raises:
            ValueError: A caption has no image, or none has two.
        """
        numbers = torch.tensor([self.numbers[caption] for caption in captions])
        pairs = [
            places
            for number in range(len(self.captions))
            if len(places := (numbers == number).nonzero()[:, 0].tolist()) == 2
        ]
        if not pairs or len(set(numbers.tolist())) < len(self.captions):
            raise ValueError("the matcher learns from one image or two of each caption, and two of some; add them")
        mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
        standard = ((features - mean) / scale).double()
        first, second = standard[torch.tensor(pairs)].unbind(1)
        within = ((first - second).T @ (first - second) / (2 * len(pairs))).numpy()
        within += RIDGE * np.trace(within) / FEATURES * np.eye(FEATURES)
        total = (standard.T @ standard / len(standard)).numpy()
        largest = [FEATURES - EMBEDDING_DIM, FEATURES - 1]
        _, directions = scipy.linalg.eigh(total, within, subset_by_index=largest)
        self.projection = torch.from_numpy(directions).float() / scale[:, None]
        self.offset = mean @ self.projection
        sums = torch.zeros_like(self.table).index_add(0, numbers, self._embedded(features))
        self.table = F.normalize(sums, dim=1)

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
        likeness = self(images) @ self.table.T
        own = likeness.gather(1, torch.tensor([[self.numbers[caption]] for caption in captions]))
        return (likeness > own).sum(1)

    def save(self, path: str | Path) -> None:
        """Write projection and table (half precision), and the captions, into one safetensors file."""
        weights = {"projection": self.projection, "table": self.table}
        weights = {name: value.half().contiguous() for name, value in weights.items()} | {"offset": self.offset}
        save_file(weights, path, metadata={"captions": json.dumps(self.captions)})

    @classmethod
    def load(cls, path: str | Path) -> ImageTextMatcher:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as opened:
            matcher = cls(json.loads(opened.metadata()["captions"]))
            for name in ("projection", "offset", "table"):
                setattr(matcher, name, opened.get_tensor(name).float())
        return matcher
