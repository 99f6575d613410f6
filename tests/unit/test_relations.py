"""Relations of scenes: what the composer says is so, and the checker tells it from what is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evaluation.metrics.relations import PREDICATES, Box, RelationChecker, Sprites, relation_of, share_right

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
try:
    from tiny_scenes import CONTAINERS, OBJECTS, Composer, is_held_out
finally:
    sys.path.pop(0)


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    """Coloured discs, each with spots of its own."""
    generator = torch.Generator().manual_seed(0)
    across = torch.linspace(-1, 1, 60)
    disc = (across[:, None].square() + across.square() <= 1).float()[None] * 255
    cut = {}
    for name in OBJECTS:
        spots = F.interpolate(torch.rand(1, 3, 4, 4, generator=generator), (60, 60), mode="bilinear")[0] * 255
        cut[name] = torch.cat([spots, disc]).round().byte()
    return Sprites(cut, CONTAINERS)


def test_boxes_are_related_in_one_way() -> None:
    box = Box(20, 20, 20, 20)
    around = {
        "left of": Box(0, 25, 10, 10),
        "right of": Box(50, 25, 10, 10),
        "above": Box(25, 2, 10, 10),
        "below": Box(25, 50, 10, 10),
        "inside": Box(26, 24, 10, 10),
        "on": Box(24, 9, 10, 10),
    }
    assert {name: relation_of(each, box) for name, each in around.items()} == {name: name for name in PREDICATES}
    assert relation_of(box, around["left of"]) == "right of" and relation_of(box, around["above"]) == "below"
    assert relation_of(box, around["inside"]) is None and relation_of(box, around["on"]) is None
    # Further aside than below.
    assert relation_of(Box(0, 50, 2, 2), Box(60, 20, 2, 2)) == "left of"


def test_composed_scenes_show_their_graphs_and_no_others(sprites: Sprites) -> None:
    composer = Composer(sprites)
    scenes = [composer.compose(number) for number in range(12)]
    checker, graphs = RelationChecker(sprites), [scene.graph for scene in scenes]
    images = torch.stack([scene.image for scene in scenes]) / 255
    assert share_right(checker.check(images, graphs)) >= 0.9
    assert share_right(checker.check(images, graphs[1:] + graphs[:1])) <= 0.1
    assert share_right(checker.check(images.flip(3), graphs)) <= 0.8  # left and right are exchanged
    nothing = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert not any(map(any, checker.check(nothing, graphs)))


def test_scenes_depend_on_seed_and_number_alone(sprites: Sprites) -> None:
    first, again, other = (Composer(sprites, seed=seed).compose(3) for seed in (0, 0, 1))
    assert first.graph == again.graph and torch.equal(first.image, again.image)
    assert first.graph != other.graph


def test_held_out_combinations_are_never_trained_on(sprites: Sprites) -> None:
    def combinations(held_out: bool) -> list[list[bool]]:
        graphs = [Composer(sprites, held_out).compose(number).graph for number in range(60)]
        assert all(2 <= len(graph["objects"]) == len(set(graph["objects"])) <= 5 for graph in graphs)
        assert all(len(graph["relations"]) >= len(graph["objects"]) - 1 for graph in graphs)
        return [
            [is_held_out(graph["objects"][s], p, graph["objects"][o]) for s, p, o in graph["relations"]]
            for graph in graphs
        ]

    assert not any(map(any, combinations(False)))
    assert all(map(any, combinations(True)))
    assert is_held_out("grapes", "left of", "banana") == is_held_out("banana", "right of", "grapes")
    share = [is_held_out(a, "left of", b) for a in OBJECTS for b in OBJECTS if a != b]
    assert 0.05 < sum(share) / len(share) < 0.15


def test_objects_are_read_as_they_were_written(sprites: Sprites, tmp_path: Path) -> None:
    sprites.save(tmp_path / "objects.png")
    read = Sprites.load(tmp_path / "objects.png")
    assert read.names == sprites.names and read.containers == list(CONTAINERS)
    assert all(torch.equal(read.cut[name], sprites.cut[name]) for name in OBJECTS)
    assert read.at("banana", 18).shape == (4, 18, 18)


def test_what_is_no_image_is_refused(sprites: Sprites) -> None:
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\]"):
        RelationChecker(sprites).scores(torch.zeros(3, 64, 64))
