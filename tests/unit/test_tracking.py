"""The tracker: it finds which object moves where in clips whose making is known, and nothing where there is nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaluation.metrics.tracking import ObjectTracker

NAMES = ("red disc", "blue disc", "blue square")
SIDE, FRAMES, OBJECT = 40, 9, 12


@pytest.fixture(scope="module")
def tracker() -> ObjectTracker:
    """Two discs that only their colours tell apart, and a square of the colour of one."""
    across = torch.arange(OBJECT) - (OBJECT - 1) / 2
    disc = (across[:, None].square() + across.square() < (OBJECT / 2) ** 2).float()
    red, blue = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.9])
    shapes = ((disc, red), (disc, blue), (torch.ones_like(disc), blue))
    through = torch.stack([(1 - shape).expand(3, -1, -1) for shape, _ in shapes])
    own = torch.stack([shape * colour[:, None, None] for shape, colour in shapes])
    return ObjectTracker(NAMES, through, own, ["a disc"])


def clip_of(
    tracker: ObjectTracker, name: str, step: tuple[int, int], ground: tuple[float, float] = (1.0, 1.0)
) -> torch.Tensor:
    """Move an object by so many pixels a frame from the middle on, over a ground from one grey to another."""
    index = NAMES.index(name)
    grey = torch.linspace(*ground, SIDE)[None, :, None].expand(3, SIDE, SIDE)
    frames = []
    for time in range(FRAMES):
        x, y = (SIDE // 2 - OBJECT // 2 + each * (time - FRAMES // 2) for each in step)
        place = (slice(None), slice(y, y + OBJECT), slice(x, x + OBJECT))
        frame = grey.clone()
        frame[place] = tracker.through[index] * grey[place] + tracker.own[index]
        frames.append(frame)
    return torch.stack(frames).permute(0, 2, 3, 1)


@pytest.mark.parametrize("ground", [(1.0, 1.0), (0.7, 0.7), (0.6, 1.0)], ids=["white", "grey", "gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_the_object_is_found_over_any_ground(tracker: ObjectTracker, name: str, ground: tuple[float, float]) -> None:
    found = tracker.track(clip_of(tracker, name, (2, 0), ground))
    assert (found.name, found.direction) == (name, "right")
    assert found.explained > 0.98
    assert found.velocity == pytest.approx((2, 0), abs=1e-5)
    assert found.places[:, 1].tolist() == [SIDE // 2 - OBJECT // 2] * FRAMES


@pytest.mark.parametrize(
    ("step", "direction"),
    [((-2, 0), "left"), ((1, 0), "right"), ((0, -2), "up"), ((0, 1), "down"), ((0, 0), None), ((2, 2), None)],
)
def test_the_direction_is_that_of_its_places(
    tracker: ObjectTracker, step: tuple[int, int], direction: str | None
) -> None:
    assert tracker.track(clip_of(tracker, "blue disc", step)).direction == direction


def test_blur_and_noise_do_not_hide_it(tracker: ObjectTracker) -> None:
    clip = clip_of(tracker, "red disc", (0, 2), (0.8, 0.8))
    blurred = torch.nn.functional.avg_pool2d(clip.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
    blurred = blurred + 0.03 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))
    found = tracker.track(blurred.permute(0, 2, 3, 1))
    assert (found.name, found.direction) == ("red disc", "down")
    assert found.explained < tracker.track(clip).explained


def test_nothing_is_found_where_nothing_is(tracker: ObjectTracker) -> None:
    noise = torch.rand(FRAMES, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    for clip in (noise, torch.full_like(noise, 0.7), torch.ones_like(noise)):
        found = tracker.track(clip)
        assert found.name is None and found.direction is None


def test_an_unknown_object_is_not_taken_for_a_known_one(tracker: ObjectTracker) -> None:
    known = ObjectTracker(NAMES[:1], tracker.through[:1], tracker.own[:1])
    found = known.track(clip_of(tracker, "blue square", (2, 0)))
    assert found.name is None


def test_what_is_saved_is_read_again(tracker: ObjectTracker, tmp_path: Path) -> None:
    tracker.save(tmp_path / "objects.safetensors")
    again = ObjectTracker.load(tmp_path / "objects.safetensors")
    assert (again.names, again.captions) == (list(NAMES), ["a disc"])
    assert torch.allclose(again.own, tracker.own, atol=0.5 / 255 + 1e-6)
    clip = clip_of(tracker, "red disc", (-1, 0))
    assert again.track(clip).name == "red disc"


@pytest.mark.parametrize("shape", [(9, 40, 40), (9, 3, 40, 40), (1, 40, 40, 3), (9, 10, 40, 3)])
def test_other_shapes_are_refused(tracker: ObjectTracker, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[F, H, W, 3\]"):
        tracker.track(torch.zeros(shape))


def test_objects_have_one_name_each(tracker: ObjectTracker) -> None:
    with pytest.raises(ValueError, match="one entry a name"):
        ObjectTracker(NAMES[:2], tracker.through, tracker.own)
