"""Whether images show the relations of a scene graph: objects are found by their templates, then compared in place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PREDICATES = ("left of", "right of", "above", "below", "inside", "on")
INVERSES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIZES = (13, 18, 30)  # pixels of the longer side: inside another, alone, and around another
INNER, ALONE, OUTER = SIZES
HIDDEN = 17  # pixels of the side of an outer object's middle
KEY = "sprites"  # of a PNG's text
BORDER = 4  # pixels
FOUND = 0.6  # the least correlation of an object that is there
TOUCHING = 3  # pixels at most between what lies on something and that
AT_ONCE = 32  # images

Graph = Mapping[str, Any]


@dataclass(frozen=True)
class Box:
    """Where an object is, in pixels."""

    left: float
    top: float
    width: float
    height: float

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2

    def within(self, other: Box, slack: float = 1) -> bool:
        """Whether this box lies in another, or past its edges by no more than ``slack``."""
        return (
            self.left >= other.left - slack
            and self.top >= other.top - slack
            and self.left + self.width <= other.left + other.width + slack
            and self.top + self.height <= other.top + other.height + slack
        )

    def rests_on(self, other: Box) -> bool:
        """Whether this box stands on the other's upper edge."""
        (x, _), (other_x, _) = self.centre, other.centre
        gap = other.top - (self.top + self.height)
        return abs(gap) <= TOUCHING and abs(x - other_x) <= other.width / 2


def relation_of(subject: Box, other: Box) -> str | None:
    """The one predicate that holds between two boxes; ``None`` where the subject contains or carries the other.

    What is neither inside nor on lies to the side into whose quadrant the line between the centres points.
    """
    if other.within(subject) or other.rests_on(subject):
        return None
    if subject.within(other):
        return "inside"
    if subject.rests_on(other):
        return "on"
    (x, y), (other_x, other_y) = subject.centre, other.centre
    if abs(x - other_x) >= abs(y - other_y):
        return "left of" if x < other_x else "right of"
    return "above" if y < other_y else "below"


class Sprites:
    """Objects that scenes are composed of, cut out: RGBA uint8 [4, H, W] by name.

    ``containers`` are the names of those in which others may lie.
    """

    def __init__(self, cut: Mapping[str, torch.Tensor], containers: Sequence[str]) -> None:
        self.cut, self.containers = dict(cut), list(containers)

    @property
    def names(self) -> list[str]:
        return list(self.cut)

    def at(self, name: str, size: int) -> torch.Tensor:
        """One object with a longer side of ``size`` pixels, float32 [4, h, w] in [0, 1], colours times alpha."""
        whole = self.cut[name].float() / 255
        whole = torch.cat([whole[:3] * whole[3:], whole[3:]])
        height, width = whole.shape[1:]
        scale = size / max(height, width)
        shape = [max(1, round(side * scale)) for side in (height, width)]
        return F.interpolate(whole[None], shape, mode="bilinear", antialias=True)[0].clamp(0, 1)

    def save(self, path: Path) -> None:
        """Write them into a PNG, side by side, with their names and sizes as its text."""
        sizes = [each.shape[1:] for each in self.cut.values()]
        sheet = torch.zeros(max(high for high, _ in sizes), sum(wide for _, wide in sizes), 4, dtype=torch.uint8)
        left = 0
        for each in self.cut.values():
            high, wide = each.shape[1:]
            sheet[:high, left : left + wide] = each.permute(1, 2, 0)
            left += wide
        told = {"objects": {name: list(each.shape[1:]) for name, each in self.cut.items()}}
        text = PngInfo()
        text.add_text(KEY, json.dumps(told | {"containers": self.containers}))
        Image.fromarray(sheet.numpy()).save(path, format="PNG", pnginfo=text)

    @classmethod
    def load(cls, path: Path) -> Sprites:
        """Read what `save` wrote."""
        with Image.open(path) as opened:
            told = json.loads(opened.text[KEY])
            sheet = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
        cut, left = {}, 0
        for name, (high, wide) in told["objects"].items():
            cut[name] = sheet[:, :high, left : left + wide].contiguous()
            left += wide
        return cls(cut, told["containers"])


class RelationChecker:
    """Finds the objects of scenes by correlation with every object at every size.

    What lies on the ground is compared in a window around it, as a difference from the ground, so that its outline
    counts. The smallest lie in containers, and are looked for in those that were found: in the pixels alone that they
    cover, with the mean over them taken off the image and off the template.
    """

    def __init__(self, sprites: Sprites) -> None:
        self.names = sprites.names
        self._templates = {size: [sprites.at(name, size) for name in self.names] for size in SIZES}
        self._contains = torch.tensor([name in sprites.containers for name in self.names])

    @torch.no_grad()
    def scores(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Correlations by size, [N, objects, H, W], at the pixel of each template's centre; -1 at the border.

        Args:
            images: [N, 3, H, W] in [0, 1].
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, 3, H, W] in [0, 1]")
        images = images.float()
        ground = images.flatten(2).median(dim=2).values
        # Squares around narrow objects reach over the border.
        differences = F.pad(images - ground[..., None, None], (BORDER,) * 4)
        images = differences + ground[..., None, None]
        result = {}
        for size in SIZES:
            canvas = self._canvas(size)
            scores = _covered(images, canvas) if size == INNER else _windowed(differences, canvas, ground, size)
            if size == OUTER:
                scores[:, ~self._contains] = -1
            before = size // 2 - BORDER
            after = size - 1 - size // 2 - BORDER
            result[size] = F.pad(scores, (before, after, before, after), value=-1)
        return result

    def _canvas(self, size: int) -> torch.Tensor:
        """All templates of a size in the middle of squares, [objects, 4, size, size]."""
        canvas = torch.zeros(len(self.names), 4, size, size)
        for square, template in zip(canvas, self._templates[size], strict=True):
            top, left = ((size - side) // 2 for side in template.shape[1:])
            square[:, top : top + template.shape[1], left : left + template.shape[2]] = template
        return canvas

    def find(self, images: torch.Tensor) -> list[dict[str, Box]]:
        """Find the objects of each image: one is there where its template fits well, and no other so large better."""
        return [found for batch in images.split(AT_ONCE) for found in self._find(batch)]

    def _find(self, images: torch.Tensor) -> list[dict[str, Box]]:
        scores = self.scores(images)
        outer = list(self._alone(scores[OUTER], OUTER))
        within = torch.zeros_like(scores[INNER][:, :1], dtype=torch.bool)
        for image, _, box, _ in outer:
            top, left = int(box.top) + INNER // 2 - 1, int(box.left) + INNER // 2 - 1
            bottom, right = (int(end) - INNER // 2 + 1 for end in (box.top + box.height, box.left + box.width))
            within[image, 0, top:bottom, left:right] = True
        inner = torch.where(within & ~self._contains[:, None, None], scores[INNER], -1)
        found = [*outer, *self._alone(scores[ALONE], ALONE), *self._alone(inner, INNER)]
        result: list[dict[str, Box]] = [{} for _ in images]
        for image, name, box, _ in sorted(found, key=lambda each: each[3]):
            result[image][name] = box
        return result

    def _alone(self, scores: torch.Tensor, size: int) -> Iterator[tuple[int, str, Box, float]]:
        """Find what fits well, and better than all other objects of this size within a few pixels: image, name, box and
        score.
        """
        rivals = F.max_pool2d(scores, 7, 1, 3).amax(dim=1).flatten(1)
        best, places = scores.flatten(2).max(dim=2)
        alone = best >= torch.maximum(rivals.gather(1, places) - 1e-6, torch.tensor(FOUND))
        for image, number in alone.nonzero().tolist():
            row, column = divmod(int(places[image, number]), scores.shape[-1])
            high, wide = self._templates[size][number].shape[1:]
            left = column - size // 2 + (size - wide) // 2
            top = row - size // 2 + (size - high) // 2
            yield image, self.names[number], Box(left, top, wide, high), float(best[image, number])

    def check(self, images: torch.Tensor, graphs: Sequence[Graph]) -> list[list[bool]]:
        """Tell of each graph's relations, in their order, whether its image shows them.

        Args:
            images: [N, 3, H, W] in [0, 1].
            graphs: N of them: ``objects``, names, and ``relations``, [subject, predicate, object] by their indices.
        """
        shown = []
        for boxes, graph in zip(self.find(images), graphs, strict=True):
            names = graph["objects"]
            shown.append(
                [
                    names[subject] in boxes
                    and names[other] in boxes
                    and relation_of(boxes[names[subject]], boxes[names[other]]) == predicate
                    for subject, predicate, other in graph["relations"]
                ]
            )
        return shown


def _covered(images: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """Correlate in the pixels that templates cover, without their mean, all three colours together."""
    masks = (canvas[:, 3:] > 0.5).float()
    colours = canvas[:, :3] / canvas[:, 3:].clamp(min=1e-3) * masks
    count = 3 * masks.sum(dim=(1, 2, 3), keepdim=True)
    kernels = (colours - colours.sum(dim=(1, 2, 3), keepdim=True) / count) * masks
    sums, squares = (F.conv2d(each.sum(dim=1, keepdim=True), masks) for each in (images, images.square()))
    deviation = (squares - sums.square() / count[:, 0]).clamp(min=1e-6).sqrt()
    return F.conv2d(images, kernels) / (deviation * kernels.square().sum(dim=(1, 2, 3)).sqrt()[:, None, None])


def _windowed(differences: torch.Tensor, canvas: torch.Tensor, ground: torch.Tensor, size: int) -> torch.Tensor:
    """Correlate windows around templates; images and templates are differences from each image's ground [N, 3]."""
    # Up to a pixel around what each template covers.
    rows, columns = (canvas[:, 3:].amax(dim=dim, keepdim=True) for dim in (3, 2))
    window = F.max_pool2d((rows * columns > 0).float(), 3, 1, 1)
    if size == OUTER:
        # Something else may lie in the middle.
        middle = slice((size - HIDDEN) // 2, (size + HIDDEN) // 2)
        window[..., middle, middle] = 0
    colours, alpha = (canvas * window).split([3, 1], dim=1)
    shaded = (differences * ground[..., None, None]).sum(dim=1, keepdim=True)
    products = F.conv2d(differences, colours) - F.conv2d(shaded, alpha)
    energy = F.conv2d(differences.square().sum(dim=1, keepdim=True), window)
    # Of each template as it is on this ground: colours - alpha * ground.
    own = colours.square().sum(dim=(1, 2, 3)) - 2 * ground @ (colours * alpha).sum(dim=(2, 3)).T
    own = own + ground.square().sum(dim=1, keepdim=True) * alpha.square().sum(dim=(1, 2, 3))
    return products / (energy.clamp(min=1e-2).sqrt() * own.clamp(min=1e-2).sqrt()[..., None, None])


def share_right(shown: Sequence[Sequence[bool]]) -> float:
    """The share of all relations that are shown."""
    return sum(map(sum, shown)) / sum(map(len, shown))
