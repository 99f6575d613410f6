"""What `xdit batch` refuses before Ray is started, and that nothing else needs Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_command_line import said

from xfuser import cli

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_RAY = """
import importlib, pkgutil, sys
sys.modules["ray"] = None
import xfuser
for module in pkgutil.walk_packages(xfuser.__path__, "xfuser."):
    if not module.name.startswith("xfuser.ray."):
        importlib.import_module(module.name)
"""


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "class_label": 1}\n')
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    return said(capsys, "batch", "--output_dir", str(tmp_path / "job"), *arguments)


def test_without_ray_a_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, prompts: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused(capsys, tmp_path, "--prompts", prompts)
    assert line == 'xdit batch: Ray is not installed; install it with: pip install "xfuser[ray]"'


def test_nothing_else_needs_ray() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT_RAY], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--groups", "4,2"], "2,4"),
        (["--groups", "0"], "--groups"),
        (["--data_parallel_degree", "2"], "use --groups"),
        (["--ulysses_degree", "5"], "does not divide"),
        (["--calibration", "first", "--target_speedup", "3"], "--calibration first"),
        (["--calibration", "auto", "--use_cache", "Tea", "--enable_adacorrection"], "count anew"),
        (["--target_speedup", "0.5"], "--target_speedup 0.5"),
        (["--interval", "3"], "--use_cache Interval"),
        (["--num_images", "3"], "--num_images is not known"),
        (["--model", "nothing/here/at/all"], "no such folder"),
    ],
)
def test_what_cannot_be_is_one_line_before_ray_is_started(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, prompts: str
) -> None:
    assert words in refused(capsys, tmp_path, "--prompts", prompts, *arguments)
    assert not (tmp_path / "job").exists()


def test_a_file_without_a_good_line_is_refused_and_says_where_the_reasons_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("bad\n{}\n")
    assert "all 2 lines are bad" in refused(capsys, tmp_path, "--prompts", str(tmp_path / "bad.jsonl"))
    assert len((tmp_path / "job" / "rejected.jsonl").read_text().splitlines()) == 2


def test_help_states_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["batch", "--help"])
    assert "3 all are there but those in rejected.jsonl" in " ".join(capsys.readouterr().out.split())
