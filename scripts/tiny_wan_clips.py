"""The clips that ``tiny-wan`` learns from, composed by rule: one emoji moves straight over a light ground."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

SIZE = 64  # pixels
OBJECT_SIZE = 28  # pixels
FRAMES = 13
SPEED = 2  # pixels a frame
OFF_CENTRE = (-4, 0, 4)  # pixels that the middle of a track may lie beside that of the frame, each way
GROUNDS = ((0.99, 0.95, 0.78), (0.78, 0.9, 0.99), (0.82, 0.96, 0.84), (0.99, 0.84, 0.88))  # beside white
STYLE = "twemoji"
# Steps of a frame, to the right and down.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OBJECTS = (
    *("red apple", "banana", "strawberry", "watermelon", "grapes", "pineapple", "carrot", "hamburger"),
    *("cat face", "panda face", "frog face", "pig face", "fox face", "tiger face", "octopus", "crab"),
    *("tropical fish", "whale", "lady beetle", "turtle", "butterfly", "penguin", "baby chick", "automobile"),
    *("taxi", "fire engine", "rocket", "sailboat", "soccer ball", "crown", "christmas tree", "blue heart"),
)
TEMPLATES = ("{} moving {}",) * 6 + ("a {} moving {}", "the {} moving {}")
Pair = tuple[str, str]  # object and direction


def caption_of(pair: Pair) -> str:
    """Say what moves, and in which direction."""
    return "{} moving {}".format(*pair)


def split_pairs(objects: tuple[str, ...] = OBJECTS, share_held_out: float = 0.125) -> tuple[list[Pair], list[Pair]]:
    """List the pairs that are trained on and those held out, no two of one object, as many of each direction."""
    names = list(DIRECTIONS)
    count = round(share_held_out * len(objects) * len(names))
    chosen = np.linspace(0, len(objects), count, endpoint=False).astype(int).tolist()
    held_out = [(objects[place], names[turn % len(names)]) for turn, place in enumerate(chosen)]
    pairs = [(thing, direction) for thing in objects for direction in names]
    return [pair for pair in pairs if pair not in held_out], held_out


@dataclass(frozen=True)
class Sprites:
    """Objects as they lie over any ground: a pixel is ``through * ground + own``, both float [N, 3, 28, 28].

    Attributes:
        names: Of the objects.
        through: What share of the ground's light passes, per channel.
        own: The light that the object adds.
    """

    names: tuple[str, ...]
    through: torch.Tensor
    own: torch.Tensor


def cut_out(images: torch.Tensor, size: int = OBJECT_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Free objects from their white ground: ``through`` and ``own`` of float images [N, 3, H, W] in [0, 1]."""
    through = torch.zeros_like(images)
    for image, passes in zip(images, through, strict=True):
        regions, _ = ndimage.label((image.amin(dim=0) > 0.97).numpy())
        rim = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        outside = np.isin(regions, np.unique(rim[rim > 0]))
        # The outermost pixels are mixed with white: multiplying shows the ground through them without a white rim.
        edge = ndimage.binary_dilation(outside, iterations=1) & ~outside
        passes[:, torch.from_numpy(outside)] = 1
        passes[:, torch.from_numpy(edge)] = image[:, torch.from_numpy(edge)]
    own = torch.where(through > 0, 0.0, images)
    shrink = {"size": (size, size), "mode": "bilinear", "antialias": True}
    return F.interpolate(through, **shrink), F.interpolate(own, **shrink)


def load_sprites(path: Path, objects: tuple[str, ...] = OBJECTS) -> Sprites:
    """Read the objects' emoji from ``emoji64.npz``.

    Raises:
        ValueError: One is not there.
    """
    with np.load(path) as archive:
        places = {
            str(caption): place
            for place, (caption, style) in enumerate(zip(archive["captions"], archive["styles"], strict=True))
            if style == STYLE
        }
        missing = [name for name in objects if name not in places]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)} in the style {STYLE}; name a file that has them")
        images = archive["images"][[places[name] for name in objects]]
    return Sprites(objects, *cut_out(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255))


def draw_ground(generator: torch.Generator) -> torch.Tensor:
    """Choose white, in half of all cases, or a light colour; float [3, SIZE, SIZE]."""
    choice = int(torch.randint(2 * len(GROUNDS), (), generator=generator))
    colour = GROUNDS[choice] if choice < len(GROUNDS) else (1.0, 1.0, 1.0)
    return torch.tensor(colour)[:, None, None].expand(3, SIZE, SIZE)


def draw_clip(sprites: Sprites, pair: Pair, generator: torch.Generator) -> torch.Tensor:
    """Compose a clip of an object that moves at constant speed, float [3, FRAMES, SIZE, SIZE] in [0, 1].

    Its ground is one of five, and the middle of its track one of nine: what a small model can learn in an hour.
    """
    thing, direction = pair
    index, (right, down) = sprites.names.index(thing), DIRECTIONS[direction]
    through, own = sprites.through[index], sprites.own[index]
    free, travel = SIZE - own.shape[-1], SPEED * (FRAMES - 1)
    ground = draw_ground(generator)
    clip = ground[:, None].repeat(1, FRAMES, 1, 1)
    places = []
    for step in (right, down):
        aside = OFF_CENTRE[int(torch.randint(len(OFF_CENTRE), (), generator=generator))]
        places.append(((free - travel * step) // 2 + aside, SPEED * step))
    (x, right), (y, down) = places
    for frame in range(FRAMES):
        rows = slice(y + frame * down, y + frame * down + own.shape[-2])
        columns = slice(x + frame * right, x + frame * right + own.shape[-1])
        clip[:, frame, rows, columns] = (through * ground[:, rows, columns] + own).clamp(0, 1)
    return clip


def draw_clips(sprites: Sprites, pairs: list[Pair], generator: torch.Generator) -> torch.Tensor:
    """Compose a clip of each pair, float [N, 3, FRAMES, SIZE, SIZE] in [0, 1]."""
    return torch.stack([draw_clip(sprites, pair, generator) for pair in pairs])


def phrase_of(pair: Pair, generator: torch.Generator) -> str:
    """Say a pair as people might."""
    return TEMPLATES[int(torch.randint(len(TEMPLATES), (), generator=generator))].format(*pair)
