"""Which of known objects moves through a clip, and in which direction: found by fitting each at each place.

The ground is the median of each row of pixels. An object at a place predicts what differs from it, and is worth the
share of that difference's energy that it explains: 1 for the object itself, no more than 0 for one that fits worse than
the bare ground. Unlike a correlation, this tells a blue heart from a green one, and finds nothing on an even ground.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

LEAST_EXPLAINED = 0.5
LEAST_SPEED = 0.5  # pixels a frame
SMALLEST_ENERGY = 1.0  # of a frame whose difference to its ground is nothing but noise


@dataclass(frozen=True)
class Track:
    """What was found in a clip.

    Attributes:
        name: Of the object that explains most; ``None`` where that is less than half.
        direction: ``"left"``, ``"right"``, ``"up"`` or ``"down"``; ``None`` where it moves by less than half
            a pixel a frame, or askew.
        explained: The share of the difference to the ground that the object explains, the mean of all frames.
        velocity: Pixels a frame to the right and down, by a straight line through its places.
        places: Its left and its upper edge in each frame, int64 [F, 2].
    """

    name: str | None
    direction: str | None
    explained: float
    velocity: tuple[float, float]
    places: torch.Tensor


class ObjectTracker:
    """Finds the object of a clip among known ones, each of which was drawn as ``through * ground + own``.

    Args:
        names: Of the objects.
        through: What share of the ground's light passes at each pixel, float [N, 3, H, W] in [0, 1].
        own: The light that the object adds there, alike.
        captions: What the model's clips are asked for, kept with the objects.
    """

    def __init__(
        self, names: Sequence[str], through: torch.Tensor, own: torch.Tensor, captions: Sequence[str] = ()
    ) -> None:
        if through.shape != own.shape or through.dim() != 4 or len(through) != len(names):
            raise ValueError(
                f"{len(names)} names, through {tuple(through.shape)} and own {tuple(own.shape)}; expected two tensors "
                "[N, 3, H, W], one entry a name"
            )
        self.names, self.captions = list(names), list(captions)
        self.through, self.own = through.float(), own.float()

    @torch.no_grad()
    def track(self, clip: torch.Tensor) -> Track:
        """Follow the object of one clip, float [F, H, W, 3] in [0, 1].

        Raises:
            ValueError: The clip has another shape, is smaller than the objects, or of one frame.
        """
        height, width = self.own.shape[-2:]
        if clip.dim() != 4 or clip.shape[-1] != 3 or len(clip) < 2 or clip.shape[1] < height or clip.shape[2] < width:
            raise ValueError(
                f"a clip has shape {tuple(clip.shape)}; expected [F, H, W, 3] of at least 2 frames of {height} x "
                f"{width} pixels"
            )
        worth = self._worth(clip.permute(0, 3, 1, 2).float())
        best, flat = worth.flatten(2).max(dim=2)
        explained, index = best.mean(dim=0).max(dim=0)
        flat = flat[:, index]
        places = torch.stack((flat % worth.shape[-1], flat // worth.shape[-1]), dim=1)
        times = torch.arange(len(clip), dtype=torch.float32)
        times = times - times.mean()
        right, down = ((times @ places.float()) / times.square().sum()).tolist()
        found = explained.item() >= LEAST_EXPLAINED
        return Track(
            self.names[int(index)] if found else None,
            direction_of(right, down) if found else None,
            explained.item(),
            (right, down),
            places,
        )

    def _worth(self, frames: torch.Tensor) -> torch.Tensor:
        """The explained share for each frame, object and place [F, N, Y, X] of frames [F, 3, H, W]."""
        count, (height, width) = len(self.names), self.own.shape[-2:]
        ground = frames.permute(1, 2, 0, 3).flatten(2).median(dim=2).values  # [3, H]
        differs = frames - ground[None, :, :, None]
        # An object predicts (through - 1) * ground + own, and nothing around it.
        passes = self.through - 1
        below = ground.unfold(1, height, 1).mean(dim=2)  # of each row of places: [3, Y]
        taken = F.conv2d(differs, passes.transpose(0, 1).reshape(3 * count, 1, height, width), groups=3)
        taken = taken.unflatten(1, (3, count))
        agreement = F.conv2d(differs, self.own) + torch.einsum("fcnyx,cy->fnyx", taken, below)
        energy = (
            self.own.square().sum(dim=(1, 2, 3))[:, None]
            + 2 * (passes * self.own).sum(dim=(2, 3)) @ below
            + passes.square().sum(dim=(2, 3)) @ below.square()
        )
        total = differs.square().sum(dim=(1, 2, 3)).clamp_min(SMALLEST_ENERGY)
        return (2 * agreement - energy[None, :, :, None]) / total[:, None, None, None]

    def save(self, path: str | Path) -> None:
        """Write the objects as bytes, with names and captions, into one safetensors file."""
        tensors = {name: (getattr(self, name) * 255).round().byte().contiguous() for name in ("through", "own")}
        save_file(tensors, path, metadata={name: json.dumps(getattr(self, name)) for name in ("names", "captions")})

    @classmethod
    def load(cls, path: str | Path) -> ObjectTracker:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as opened:
            told = opened.metadata()
            through, own = (opened.get_tensor(name).float() / 255 for name in ("through", "own"))
        return cls(json.loads(told["names"]), through, own, json.loads(told["captions"]))


def direction_of(right: float, down: float) -> str | None:
    """Name the direction of a velocity in pixels a frame; ``None`` where it is slow or not along one axis."""
    (slow, _), (fast, name) = sorted(
        ((abs(right), "right" if right > 0 else "left"), (abs(down), "down" if down > 0 else "up"))
    )
    return name if fast >= LEAST_SPEED and fast >= 2 * slow else None
