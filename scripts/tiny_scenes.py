"""Scenes for ``tiny-sgdiff``, composed by rule of emoji on plain or lightly textured grounds, with their exact graphs.

Images have 64 x 64 pixels and 2 to 5 different objects. A tenth of all combinations of two objects and a relation are
held out: no scene that is trained on has one, said or unsaid, and every held-out graph says at least one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from evaluation.metrics.relations import INVERSES, SIZES, Box, Sprites, relation_of

IMAGE = 64  # pixels
STYLE = "noto"
CONTAINERS = ("ring buoy", "framed picture", "package", "crystal ball")
THINGS = (
    *("red apple", "banana", "blue heart", "soccer ball", "grapes", "frog face", "pig face", "fox face"),
    *("evergreen tree", "mushroom", "penguin", "doughnut", "crown", "gem stone", "billiards", "sunflower"),
)
OBJECTS = (*THINGS, *CONTAINERS)
HOLLOW = "ring buoy"
MOST_OBJECTS, MOST_RELATIONS = 5, 6
INNER, ALONE, OUTER = SIZES
HELD_OUT = 0.1  # of all combinations
GROUNDS = ((255, 255, 255), (214, 234, 248), (252, 243, 207), (213, 245, 227), (250, 219, 216), (232, 218, 239))
CLEAR = 1.4  # ratio of the longer offset between centres to the shorter one, where a side is said
APART = 2  # pixels at least between what does not touch


@dataclass(frozen=True)
class Scene:
    """An image, uint8 [3, 64, 64], and its graph: names of objects, and [subject, predicate, object] by index."""

    image: torch.Tensor
    graph: dict[str, Any]


def cut_sprites(path: Path) -> Sprites:
    """Cut the objects out of ``emoji64.npz``, whose ground is white."""
    with np.load(path) as archive:
        images, captions, styles = archive["images"], archive["captions"], archive["styles"]
    cut = {}
    for name in OBJECTS:
        (places,) = np.nonzero((captions == name) & (styles == STYLE))
        if len(places) != 1:
            raise ValueError(f"{path} has {len(places)} images of {name!r} in the style {STYLE}; expected one")
        image = images[places[0]]
        regions, _ = ndimage.label(image.min(axis=2) > 245)
        edges = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        outside = np.isin(regions, np.setdiff1d(edges, 0))
        if name == HOLLOW:
            outside |= (regions == regions[len(image) // 2, len(image) // 2]) & (regions > 0)
        # The pixels next to it are mixed with the white ground.
        covered = ~ndimage.binary_dilation(outside)
        rows, columns = (np.nonzero(covered.any(axis=axis))[0] for axis in (1, 0))
        whole = np.concatenate([image, covered[..., None] * np.uint8(255)], axis=2)
        whole = whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        cut[name] = torch.from_numpy(whole).permute(2, 0, 1).contiguous()
    return Sprites(cut, CONTAINERS)


def is_held_out(subject: str, predicate: str, other: str) -> bool:
    """Whether a combination belongs to the held-out tenth; its inverse does then, too."""
    if predicate in ("right of", "below"):
        subject, predicate, other = other, INVERSES[predicate], subject
    digest = hashlib.sha256(f"{subject}|{predicate}|{other}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


class Composer:
    """Composes scenes, each of its own number."""

    def __init__(self, sprites: Sprites, held_out: bool = False, seed: int = 0) -> None:
        self.held_out, self.seed = held_out, seed
        self.sprites = {(name, size): sprites.at(name, size) for name in OBJECTS for size in SIZES}

    def compose(self, number: int) -> Scene:
        """Compose the scene of this number."""
        generator = np.random.default_rng((self.seed, int(self.held_out), number))
        while True:
            placed = self._place(generator)
            if placed is None:
                continue
            graph = self._describe(placed, generator)
            if graph is not None:
                return Scene(self._paint(placed, generator), graph)

    def _place(self, generator: np.random.Generator) -> dict[str, tuple[int, Box]] | None:
        """Choose objects, sizes and places that do not overlap; ``None`` where they did not fit."""
        count = int(generator.integers(2, MOST_OBJECTS + 1))
        things = list(generator.permutation(THINGS))
        others = list(generator.permutation(OBJECTS))
        has_inner, has_stack = generator.random(2) < 0.4
        units: list[list[tuple[str, int, int, int]]] = []  # name, size, left and top in the unit
        used: set[str] = set()

        def take(names: list[str]) -> str:
            name = str(next(each for each in names if each not in used))
            used.add(name)
            return name

        if has_inner:
            outer, inner = take(list(generator.permutation(CONTAINERS))), take(things)
            (high, wide), (height, width) = self._shape(outer, OUTER), self._shape(inner, INNER)
            shift = generator.integers(-3, 4, 2)
            left, top = (wide - width) // 2 + shift[0], (high - height) // 2 + shift[1]
            units.append([(outer, OUTER, 0, 0), (inner, INNER, int(left), int(top))])
        if has_stack and count - len(used) >= 2:
            upper, lower = take(things), take(others)
            (high, wide), (height, width) = self._shape(upper, ALONE), self._shape(lower, ALONE)
            left = int((width - wide) // 2 + generator.integers(-3, 4))
            units.append([(upper, ALONE, max(left, 0), 0), (lower, ALONE, max(-left, 0), high)])
        while len(used) < count:
            units.append([(take(others), ALONE, 0, 0)])
        placed: dict[str, tuple[int, Box]] = {}
        taken: list[Box] = []
        for unit in units:
            boxes = [Box(left, top, *self._shape(name, size)[::-1]) for name, size, left, top in unit]
            wide = int(max(box.left + box.width for box in boxes))
            high = int(max(box.top + box.height for box in boxes))
            for _ in range(20):
                x, y = int(generator.integers(0, IMAGE - wide + 1)), int(generator.integers(0, IMAGE - high + 1))
                if all(
                    x >= box.left + box.width + APART
                    or box.left >= x + wide + APART
                    or y >= box.top + box.height + APART
                    or box.top >= y + high + APART
                    for box in taken
                ):
                    break
            else:
                return None
            taken.append(Box(x, y, wide, high))
            for (name, size, _, _), box in zip(unit, boxes, strict=True):
                placed[name] = size, Box(box.left + x, box.top + y, box.width, box.height)
        return placed

    def _shape(self, name: str, size: int) -> tuple[int, int]:
        height, width = self.sprites[name, size].shape[1:]
        return int(height), int(width)

    def _describe(self, placed: dict[str, tuple[int, Box]], generator: np.random.Generator) -> dict[str, Any] | None:
        """Say relations that connect all objects; ``None`` where too few are clear, or the wrong ones are held out."""
        names = [str(name) for name in generator.permutation(list(placed))]
        clear: list[tuple[int, str, int]] = []
        for subject in range(len(names)):
            for other in range(len(names)):
                if subject == other:
                    continue
                box, against = placed[names[subject]][1], placed[names[other]][1]
                predicate = relation_of(box, against)
                if predicate is None:
                    continue
                if not self.held_out and is_held_out(names[subject], predicate, names[other]):
                    return None
                if predicate not in INVERSES or (subject < other and _is_clear(box, against)):
                    clear.append((subject, predicate, other))
        # What touches comes first, so that it is always said.
        order = [clear[place] for place in generator.permutation(len(clear))]
        order.sort(key=lambda relation: relation[1] in INVERSES)
        group = list(range(len(names)))
        said, spare = [], []
        for subject, predicate, other in order:
            if group[subject] == group[other]:
                spare.append((subject, predicate, other))
                continue
            said.append((subject, predicate, other))
            group = [group[subject] if each == group[other] else each for each in group]
        if len(set(group)) > 1:
            return None
        said += spare[: min(int(generator.integers(0, 3)), MOST_RELATIONS - len(said))]
        relations = []
        for subject, predicate, other in said:
            if predicate in INVERSES and generator.random() < 0.5:
                subject, predicate, other = other, INVERSES[predicate], subject
            relations.append([subject, predicate, other])
        if self.held_out and not any(is_held_out(names[s], p, names[o]) for s, p, o in relations):
            return None
        return {"objects": names, "relations": [relations[place] for place in generator.permutation(len(relations))]}

    def _paint(self, placed: dict[str, tuple[int, Box]], generator: np.random.Generator) -> torch.Tensor:
        """Lay the objects on a ground."""
        image = torch.from_numpy(_ground(generator))
        for name, (size, box) in placed.items():
            sprite = self.sprites[name, size]
            top, left = int(box.top), int(box.left)
            area = image[:, top : top + sprite.shape[1], left : left + sprite.shape[2]]
            area.mul_(1 - sprite[3:]).add_(sprite[:3])
        return (image * 255).round().byte()


def _is_clear(box: Box, other: Box) -> bool:
    """Whether nobody would argue about the side, nor whether the two touch."""
    horizontal, vertical = (abs(a - b) for a, b in zip(box.centre, other.centre, strict=True))
    if vertical > horizontal:
        upper, lower = sorted((box, other), key=lambda each: each.top)
        if lower.top - upper.top - upper.height < 6:
            return False
    return max(horizontal, vertical) >= CLEAR * min(horizontal, vertical)


def _ground(generator: np.random.Generator) -> np.ndarray:
    """A pale colour, alone, with a gradient or with stripes; float32 [3, 64, 64] in [0, 1]."""
    colour = np.array(GROUNDS[generator.integers(len(GROUNDS))], np.float32) / 255
    kind = generator.integers(3)
    rows, columns = np.meshgrid(np.arange(IMAGE), np.arange(IMAGE), indexing="ij")
    shade = np.zeros((IMAGE, IMAGE), np.float32)
    if kind == 1:
        shade = (rows / IMAGE * 0.08).astype(np.float32)
    elif kind == 2:
        along = rows if generator.random() < 0.5 else columns
        shade = ((along // 8 % 2) * 0.04).astype(np.float32)
    return np.clip(colour[:, None, None] - shade, 0, 1)
