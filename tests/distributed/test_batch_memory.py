"""`xdit batch` where one rank of two runs out of memory: halves, then a refusal with what would fit; nothing hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ROOT, run

pytest.importorskip("ray")
import pyarrow.parquet  # noqa: E402 (comes with Ray)

pytestmark = pytest.mark.slow
HELPERS = Path(__file__).with_name("ray_helpers")


@pytest.mark.parametrize(("steps", "fits"), [(6, True), (8, False)])
def test_one_rank_out_of_memory_halves_the_batch_on_all_or_has_it_refused(
    steps: int, fits: bool, tmp_path: Path
) -> None:
    """Two images of 6 steps fit, and one of 8; the batch has four. The first rank would wait for the second 600 s."""
    lines = [{"id": f"a{index}", "class_label": index, "seed": index, "steps": steps} for index in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    arguments = ["batch", "--prompts", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / "job"]
    arguments += ["--batch_size", 4, "--threads", 1, "--ulysses_degree", 2]
    commands = tmp_path / "commands.json"
    commands.write_text(json.dumps([{"arguments": [str(each) for each in arguments]}]))
    paths = {"PYTHONPATH": f"{ROOT}:{HELPERS}"}  # Ray's processes have to find the function
    done = run(HELPERS / "run_commands.py", commands, "little_memory.install", limit=500, **paths)
    assert done.code == 0, done.err[-3000:]
    (ended,) = json.loads((tmp_path / "commands.ended.json").read_text())
    rows = pyarrow.parquet.read_table(tmp_path / "job" / "manifest.parquet").to_pylist()
    if fits:
        assert ended["code"] == 0, ended["err"]
        assert [(row["id"], row["batch_images"], row["attempt"]) for row in rows] == [(f"a{n}", 2, 1) for n in range(4)]
        return
    assert ended["code"] == 3 and not rows, ended["err"]
    rejected = [json.loads(line) for line in (tmp_path / "job" / "rejected.jsonl").read_text().splitlines()]
    assert [each["id"] for each in rejected] == [f"a{index}" for index in range(4)]
    assert all("use --batch_size 1 or less" in each["reason"] for each in rejected)
