"""Whether images show the relations of a scene graph: objects are found by their templates, then compared in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

PREDICATES = ("left of", "right of", "above", "below", "inside", "on")
INVERSES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIZES = (13, 18, 30)  # pixels of the longer side: inside another, alone, and around another
OUTER = SIZES[-1]
HIDDEN = 17  # pixels of the side of an outer object's middle
FOUND = 0.6  # the least correlation of an object that is there
NEARLY = 0.08  # of correlation, by which the larger of two sizes may fit worse
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
        """Write them into a safetensors file, in their order."""
        tensors = {f"{number:02}.{name}": each.contiguous() for number, (name, each) in enumerate(self.cut.items())}
        save_file(tensors, path, metadata={"containers": json.dumps(self.containers)})

    @classmethod
    def load(cls, path: Path) -> Sprites:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as opened:
            cut = {key.partition(".")[2]: opened.get_tensor(key) for key in sorted(opened.keys())}
            return cls(cut, json.loads(opened.metadata()["containers"]))


class RelationChecker:
    """Finds the objects of scenes by normalised cross-correlation with every object at every size.

    The correlation is over the pixels that the object covers, all three colours together: the mean over them is taken
    off the image and off the template, so that neither brightness nor contrast counts.
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
        return {size: self._scores_at(images.float(), size) for size in SIZES}

    def _scores_at(self, images: torch.Tensor, size: int) -> torch.Tensor:
        templates = self._templates[size]
        kernels, masks = torch.zeros(len(templates), 3, size, size), torch.zeros(len(templates), 1, size, size)
        for number, template in enumerate(templates):
            height, width = template.shape[1:]
            top, left = (size - height) // 2, (size - width) // 2
            covered = (template[3] > 0.5).float()
            if size == OUTER:
                # Something else may lie there.
                middle = [slice((side - HIDDEN) // 2, (side + HIDDEN) // 2) for side in (height, width)]
                covered[middle[0], middle[1]] = 0
            colours = template[:3] / template[3].clamp(min=1e-3) * covered
            colours = (colours - colours.sum() / (3 * covered.sum())) * covered
            kernels[number, :, top : top + height, left : left + width] = colours
            masks[number, 0, top : top + height, left : left + width] = covered
        count = 3 * masks.sum(dim=(1, 2, 3))[:, None, None]
        products = F.conv2d(images, kernels)
        sums, squares = (F.conv2d(each.sum(dim=1, keepdim=True), masks) for each in (images, images.square()))
        deviation = (squares - sums.square() / count).clamp(min=1e-6).sqrt()
        norms = kernels.square().sum(dim=(1, 2, 3)).sqrt()[:, None, None]
        before = size // 2
        after = size - 1 - before
        scores = products / (deviation * norms)
        if size == OUTER:
            scores[:, ~self._contains] = -1
        return F.pad(scores, (before, after, before, after), value=-1)

    def find(self, images: torch.Tensor) -> list[dict[str, Box]]:
        """Find the objects of each image: one is there where its template fits well, and no other so large better."""
        return [found for batch in images.split(AT_ONCE) for found in self._find(batch)]

    def _find(self, images: torch.Tensor) -> list[dict[str, Box]]:
        scores = self.scores(images)
        width = images.shape[-1]
        result: list[dict[str, Box]] = [{} for _ in images]
        scored: list[dict[str, float]] = [{} for _ in images]
        for size, each in scores.items():
            # Of all objects at this size, the best within a few pixels of each place.
            rivals = F.max_pool2d(each, 7, 1, 3).amax(dim=1).flatten(1)
            best, places = each.flatten(2).max(dim=2)
            alone = best >= torch.maximum(rivals.gather(1, places) - 1e-6, torch.tensor(FOUND))
            for image, number in alone.nonzero().tolist():
                row, column = divmod(int(places[image, number]), width)
                high, wide = self._templates[size][number].shape[1:]
                left = column - size // 2 + (size - wide) // 2
                top = row - size // 2 + (size - high) // 2
                name, score = self.names[number], float(best[image, number])
                box, before = Box(left, top, wide, high), scored[image].get(name, -1.0)
                # A small template of one colour fits into an object almost as well as its own does.
                if score >= before or (score >= before - NEARLY and result[image][name].within(box)):
                    result[image][name], scored[image][name] = box, score
        return result

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


def share_right(shown: Sequence[Sequence[bool]]) -> float:
    """The share of all relations that are shown."""
    return sum(map(sum, shown)) / sum(map(len, shown))
