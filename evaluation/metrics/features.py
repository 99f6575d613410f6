"""The small classifier that stands where InceptionV3 would: its features give FID and KID, its logits the class."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

FEATURE_DIM = 64
NUM_CLASSES = 10
IMAGE_SIZE = 32


class FeatureNetwork(nn.Module):
    """Convolutional classifier over 32 x 32 grey images.

    ``forward`` takes images of shape [N, C, H, W] in [0, 1] (C is 1 or 3; any size, resized to 32 x 32) and returns
    features of shape [N, 64]. ``classify`` returns logits of shape [N, 10].
    """

    num_features = FEATURE_DIM

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for inputs, outputs in ((1, 32), (32, 64), (64, 128))
        )
        self.embed = nn.Linear(128 * (IMAGE_SIZE // 8) ** 2, FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps after each stage, for a perceptual loss."""
        hidden_states = self._prepare(images)
        outputs = []
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            outputs.append(hidden_states)
        return outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(self.embed(self.maps(images)[-1].flatten(1)))

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward(images))

    @staticmethod
    def _prepare(images: torch.Tensor) -> torch.Tensor:
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, 1 or 3, H, W] in [0, 1]")
        images = images.float()
        if images.shape[1] == 3:
            images = images.mean(dim=1, keepdim=True)
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        return images * 2 - 1

    @classmethod
    def load(cls, path: str | Path) -> FeatureNetwork:
        """Read the weights (safetensors) and return the network in evaluation mode."""
        network = cls()
        network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return network.eval().requires_grad_(False)
