"""A rank that fails stops all of them, soon, and each says why in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launching import GENERATE, Ended, by_hand, torchrun

FAULTY = Path(__file__).parent / "faulty.py"
LIMIT = 30  # seconds within which the others have to be gone
TINY = ["--class_label", "0", "--num_inference_steps", "8", "--threads", "1"]


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says when the fault has happened."""
    path = tmp_path / "fault"
    monkeypatch.setenv("XFUSER_FAULT_FILE", str(path))
    return path


def soon(fault: Path) -> None:
    assert time.time() - float(fault.read_text()) < LIMIT


def check_raised(ended: list[Ended], failing: int) -> None:
    for rank, each in enumerate(ended):
        assert each.code == 1
        assert len(each.lines()) == 1, each.err
        assert each.lines()[0].startswith(f"xdit generate: rank {rank}: "), each.err
        cause = "the fault of this test" if rank == failing else "lost contact with another rank that shares this image"
        assert cause in each.err and "Traceback" not in each.err


def test_a_rank_that_raises(fault: Path, tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    ended = by_hand(2, FAULTY, "raise", "1", *TINY, "--ulysses_degree", "2", *out)
    soon(fault)
    check_raised(ended, 1)
    assert "in step 3 of 8" in ended[0].err
    assert not list(tmp_path.glob("out/*")), "nothing half-written is left behind"


def test_a_rank_that_is_killed(fault: Path, tmp_path: Path) -> None:
    """The other stage of PipeFusion waits for it in a receive."""
    out = ["--output_dir", str(tmp_path / "out")]
    alive, killed = by_hand(2, FAULTY, "kill", "1", *TINY, "--pipefusion_parallel_degree", "2", *out)
    soon(fault)
    assert killed.code == -9 and killed.lines() == []
    assert alive.code == 1 and len(alive.lines()) == 1
    assert "rank 0: lost contact with another rank that shares this image, in step" in alive.err


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_under_torchrun(how: str, fault: Path, tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    ended = torchrun(2, FAULTY, how, "0", *TINY, "--ulysses_degree", "2", *out)
    soon(fault)
    assert ended.code == 1
    said = {line.split(": ")[1]: line for line in ended.lines()}
    assert set(said) == ({"rank 0", "rank 1"} if how == "raise" else {"rank 1"}), ended.err
    assert any(cause in said["rank 1"] for cause in ("lost contact with another rank", "stopped by the launcher"))


def test_a_rank_that_stands_still_is_missed(fault: Path, tmp_path: Path) -> None:
    """Its connections stay open; --timeout decides."""
    out = ["--output_dir", str(tmp_path / "out"), "--timeout", "3"]
    (alive,) = by_hand(2, FAULTY, "stop", "1", *TINY, "--ulysses_degree", "2", *out, awaited=1)
    soon(fault)
    assert alive.code == 1 and len(alive.lines()) == 1
    assert "rank 0: lost contact with another rank that shares this image, in step 3" in alive.err


def test_a_rank_that_cannot_begin(tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    first, second = by_hand(2, FAULTY, "load", "1", *TINY, "--ulysses_degree", "2", *out)
    assert (first.code, second.code) == (1, 1)
    assert first.lines() == ["xdit generate: rank 0: stopped, since rank 1 could not begin: the fault of this test"]
    assert second.lines() == ["xdit generate: rank 1: could not begin: the fault of this test"]


def test_degrees_that_do_not_fit_are_refused_once(tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    ended = by_hand(2, GENERATE, *TINY, "--ulysses_degree", "4", *out)
    assert [each.code for each in ended] == [2, 2]
    assert len(ended[0].err.splitlines()) == 1 and "2 processes were started" in ended[0].err
    assert ended[1].err == ""
