"""`xdit batch` with an embedded Ray that is killed, or asked to stop: it goes on, and leaves no process behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import environment, run, start

pytest.importorskip("ray")
import pyarrow.parquet  # noqa: E402 (comes with Ray)

pytestmark = pytest.mark.slow
COUNT = 48
SETTINGS = ["--num_inference_steps", "6", "--batch_size", "4", "--threads", "1", "--groups", "2", "--max_attempts", "5"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(f'{{"id": "a{n}", "class_label": {n % 10}, "seed": {n}}}\n' for n in range(COUNT)))
    return path


@pytest.fixture(scope="module")
def undisturbed(prompts: Path) -> list[str]:
    folder = prompts.parent / "undisturbed"
    done = run("-m", "xfuser.cli", *arguments(prompts, folder), limit=900)
    assert done.code == 0, done.err
    return digests(folder)


def arguments(prompts: Path, folder: Path) -> list[str]:
    return ["batch", "--prompts", str(prompts), "--output_dir", str(folder), *SETTINGS]


def digests(folder: Path) -> list[str]:
    """Every image's digest, in order, compared with its file's."""
    rows = pyarrow.parquet.read_table(folder / "manifest.parquet").to_pydict()
    assert rows["id"] == [f"a{n}" for n in range(COUNT)]
    assert len([each for each in (folder / "images").rglob("*") if each.is_file()]) == COUNT
    for path, digest in zip(rows["path"], rows["sha256"], strict=True):
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest
    return rows["sha256"]


def rows_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("manifest/*.jsonl"))


def of_session(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """What a command's Ray consists of."""
    return psutil.Process(process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process], seconds: float = 20.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def when(process: subprocess.Popen[str], folder: Path, rows: int) -> None:
    """Wait until a run has made so many images."""
    while rows_in(folder) < rows and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1]


def kill_a_group(session: list[psutil.Process]) -> None:
    victims = [each for each in session if each.is_running() and each.name().startswith("ray::Group")]
    os.kill(random.choice(victims).pid, signal.SIGKILL)


def kill_the_node(session: list[psutil.Process]) -> None:
    next(each for each in session if each.is_running() and each.name() == "raylet").kill()


@pytest.mark.parametrize(
    ("how", "codes"),
    # A node that dies when all images are made takes nothing with it.
    [("groups", (0,)), ("driver", (-9,)), ("node", (0, 1, -6, -9)), ("sigterm", (143,)), ("sigint", (130,))],
)
def test_whatever_is_killed_nothing_is_lost(
    how: str, codes: tuple[int, ...], prompts: Path, undisturbed: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    process = start("-m", "xfuser.cli", *arguments(prompts, folder))
    kill: dict[str, Callable[[Any], None]] = {
        "groups": kill_a_group,
        "driver": lambda _: process.kill(),
        "node": kill_the_node,
        "sigterm": lambda _: process.terminate(),
        "sigint": lambda _: process.send_signal(signal.SIGINT),
    }
    when(process, folder, 4)
    session = of_session(process)
    assert len(session) > 3
    for moment in (4, 12, 20) if how == "groups" else (8,):
        when(process, folder, moment)
        kill[how](of_session(process) if how == "groups" else session)
        time.sleep(random.random())
    _, err = process.communicate(timeout=600)
    assert process.returncode in codes, err
    assert all_gone(session), [each.name() for each in session if each.is_running()]
    done = run("-m", "xfuser.cli", *arguments(prompts, folder), limit=900)
    assert done.code == 0, done.err
    assert digests(folder) == undisturbed
    if how == "groups":
        assert "0 in this run" in done.out  # nothing was left to do
    assert not list(folder.rglob("*.partial"))
    assert json.loads((folder / "summary.json").read_text())["missing"] == 0


def test_ctrl_c_in_a_terminal_ends_all_of_it_and_twice_at_once(
    prompts: Path, undisturbed: list[str], tmp_path: Path
) -> None:
    """A terminal sends it to every process of the group, Ray's among them."""
    folder = tmp_path / "job"

    def interrupted(rows: int, times: int, *more: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "xfuser.cli", *arguments(prompts, folder), *more],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        when(process, folder, rows)
        session = of_session(process)
        if times > 1:  # what is in flight would take for ever
            for each in session:
                if each.name().startswith("ray::Group"):
                    each.suspend()
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(1)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
        assert all_gone(session), [each.name() for each in session if each.is_running()]
        return err

    assert "once more ends it now" in interrupted(4, 2, "--grace", "1000")
    assert f"of {COUNT} images are there" in interrupted(rows_in(folder) + 4, 1)
    done = run("-m", "xfuser.cli", *arguments(prompts, folder), limit=900)
    assert done.code == 0, done.err
    assert digests(folder) == undisturbed
