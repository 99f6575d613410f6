"""What a worker group does where memory or the disk does not suffice, without Ray's processes."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

from test_batch_work import request  # noqa: E402

from xfuser.ray.batch import group as group_module  # noqa: E402
from xfuser.ray.batch.folder import JobFolder  # noqa: E402
from xfuser.ray.batch.group import Group, NeedsHalves, NoRoom, NotShared, TooLarge, encoded  # noqa: E402
from xfuser.ray.batch.manifest import ManifestWriter, read_rows  # noqa: E402
from xfuser.ray.rank import EngineSettings  # noqa: E402

FACTS = {"evaluated_share": 1.0, "evaluated_steps": 50, "plan_digest": None}


class Ranks:
    """Stands for loaded ranks whose memory holds so many images; several of them do not survive what it does not."""

    def __init__(self, fit: int, several: bool = False) -> None:
        self._fit, self._several, self.asked, self.lost = fit, several, [], False

    def generate(self, calls: list[dict[str, Any]]) -> tuple[np.ndarray, dict[str, Any]]:
        self.asked.append(len(calls))
        if len(calls) > self._fit:
            self.lost = self._several
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return np.stack([np.full((8, 8, 3), each["seed"] / 100, np.float32) for each in calls]), FACTS


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(group_module.ray, "get", list)
    folder = JobFolder(tmp_path, {}, resume=True, overwrite=False)
    requests = [request(index) for index in range(4)]
    folder.begin(requests, 4)

    def of(fit: int, several: bool = False) -> tuple[Group, Ranks, Any]:
        group = Group(0, str(tmp_path), folder.job, "png", {}, [])
        ranks = group._ranks = Ranks(fit, several)  # type: ignore[assignment]
        group._manifest = ManifestWriter(tmp_path, "a")
        return group, ranks, lambda halved=False: group.make(0, range(4), requests, 1, [], halved)

    return of


def test_a_batch_that_does_not_fit_is_halved_once_and_so_are_those_behind_it(make: Any, tmp_path: Path) -> None:
    _, ranks, run = make(2)
    assert run().images == 4 and ranks.asked == [4, 2, 2]
    run()
    assert ranks.asked == [4, 2, 2, 2, 2]
    assert {row["batch_images"] for row in read_rows(tmp_path)} == {2}
    assert [row["id"] for row in read_rows(tmp_path)][:4] == ["a0", "a1", "a2", "a3"]


def test_what_does_not_fit_by_halves_is_refused_with_what_may(make: Any) -> None:
    _, ranks, run = make(1)
    with pytest.raises(TooLarge, match="use --batch_size 1 or less"):
        run()
    assert ranks.asked == [4, 2]


def test_several_ranks_are_started_again_before_halves_are_tried(make: Any) -> None:
    """One of them may wait for another in the middle of the batch, so that none can be asked for anything."""
    _, ranks, run = make(2, several=True)
    with pytest.raises(NeedsHalves):
        run()
    with pytest.raises(RuntimeError, match="has to be started again"):
        run()
    assert ranks.asked == [4]
    _, ranks, run = make(2, several=True)
    assert run(halved=True).images == 4 and ranks.asked == [2, 2]
    _, ranks, run = make(1, several=True)
    with pytest.raises(TooLarge, match="use --batch_size 1 or less"):
        run(halved=True)


def test_a_full_disk_is_told_and_leaves_no_half_of_a_row(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, run = make(4)

    def full(*unused: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(NoRoom, match="No space left on device in"):
            run()
    assert not list(read_rows(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(NoRoom):
            run()
    assert not list(tmp_path.rglob("*.partial"))
    assert run().images == 4 and len(list(read_rows(tmp_path))) == 4


def test_another_folder_on_the_groups_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotShared, match="does not see the job.json"):
        Group(0, str(tmp_path), "job", "png", {}, []).load(EngineSettings("tiny-dit"))


def test_what_is_encoded_is_what_was_made() -> None:
    import io

    from PIL import Image

    pixels = np.linspace(0, 1, 8 * 8 * 3, dtype=np.float32).reshape(8, 8, 3)
    read = np.asarray(Image.open(io.BytesIO(encoded(pixels, "png"))))
    assert np.array_equal(read, np.round(pixels * 255).astype(np.uint8))
