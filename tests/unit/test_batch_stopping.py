"""Ctrl-C and SIGTERM: the first one ends nothing that is all but done, and the next one ends whatever there is."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from test_batch_folder import row  # noqa: E402

from xfuser import cli  # noqa: E402
from xfuser.model_executor.pipelines.choosing import resolve_model  # noqa: E402
from xfuser.ray.batch import command  # noqa: E402
from xfuser.ray.batch.folder import JobFolder  # noqa: E402
from xfuser.ray.batch.manifest import ManifestWriter, merge  # noqa: E402
from xfuser.ray.batch.prompts import read_requests  # noqa: E402
from xfuser.ray.batch.stopping import StopRequests  # noqa: E402

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The command of a job whose images are all there, so that only the table and the report are left."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": "a{place}", "class_label": {place}}}\n' for place in range(3)))
    listed = ["batch", "--prompts", str(prompts), "--output_dir", str(tmp_path / "job")]
    args = cli.build_parser().parse_args(listed)
    resolve_model(args)
    settings = command.engine_settings(args)
    folder = JobFolder(args.output_dir, command.recorded_settings(args, settings), resume=True, overwrite=False)
    folder.begin(read_requests(args.prompts, command.rules_of(args, settings)), args.batch_size)
    ManifestWriter(folder.path, "a").append([row(folder.path, place) for place in range(3)])
    folder.close()
    return listed


def during_the_merge(monkeypatch: pytest.MonkeyPatch, *sent: signal.Signals) -> None:
    """Have signals arrive while the table is written."""

    def interrupted(*arguments: Any) -> Any:
        for each in sent:
            os.kill(os.getpid(), each)
        return merge(*arguments)

    monkeypatch.setattr(command, "merge", interrupted)


@pytest.mark.parametrize("number", list(CODES))
def test_a_signal_while_the_table_is_written_is_heard_and_ends_nothing(
    number: signal.Signals,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    during_the_merge(monkeypatch, number)
    cli.main(arguments)  # an exit code other than 0 would raise
    told = capfd.readouterr()
    assert "3 images in" in told.out and "another signal ends that" in told.err
    assert json.loads((tmp_path / "job" / "summary.json").read_text())["missing"] == 0
    assert (tmp_path / "job" / "report.html").is_file()


@pytest.mark.parametrize("number", list(CODES))
def test_a_second_one_ends_it_and_the_command_goes_on_later(
    number: signal.Signals, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        during_the_merge(patched, number, number)
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
    assert left.value.code == CODES[number]
    assert not (tmp_path / "job" / "summary.json").exists()
    cli.main(arguments)
    assert (tmp_path / "job" / "manifest.parquet").is_file()


def test_a_running_job_is_asked_once_told_to_hurry_twice_and_ended_the_third_time() -> None:
    before = [signal.getsignal(number) for number in CODES]
    with StopRequests() as stops:
        stops.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stops.first, stops.count) == ("SIGTERM", 1)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stops.first, stops.count) == ("SIGTERM", 2)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGINT)
        assert left.value.code == 130
    assert [signal.getsignal(number) for number in CODES] == before
