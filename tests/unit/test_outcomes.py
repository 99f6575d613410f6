"""One row of a benchmark that fails, or a cache that never hits, costs nothing of what the others measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmark import cache_execute, peers, sensitivity
from benchmark.judge import Judge
from benchmark.measure import Sampling, measure
from benchmark.outcomes import exit_code, failures, remarks
from benchmark.peer_tools import Attached, Peer, Subject
from benchmark.rows import Correction, Row, rows_of, uncached
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline

SAMPLING = Sampling(num_images=2, batch_size=1, num_inference_steps=6, guidance_scale=1.5, seed=5)
HITS = {"use_cache": "Tea", "rel_l1_thresh": 0.5}
NEVER_HITS = {"use_cache": "Tea", "rel_l1_thresh": 0}


@pytest.fixture(scope="module")
def tiny() -> LoadedPipeline:
    return load_pipeline("tiny-dit")


def tea_rows(settings: dict[str, Any]) -> list[Row]:
    return [uncached(), *rows_of("Tea", settings, True, Correction({"enable_adacorrection": True}))]


class Tripwire:
    """Raises in the first call of a module after it was set."""

    def __init__(self, module: nn.Module) -> None:
        self.set = False
        self.handle = module.register_forward_pre_hook(self._step_on)

    def _step_on(self, *unused: Any) -> None:
        if self.set:
            self.set = False
            raise RuntimeError("out of memory\nand a page of advice")


@pytest.fixture
def tripwire(tiny: LoadedPipeline) -> Iterator[Tripwire]:
    wire = Tripwire(tiny.pipeline.transformer)
    yield wire
    wire.handle.remove()


def test_a_row_that_fails_takes_only_what_needs_it_along(tiny: LoadedPipeline, tripwire: Tripwire) -> None:
    """The second batch begins with the base method, which is what trips."""
    rows, judge = tea_rows(HITS), Judge(tiny, None)

    def see(runs: list[Any], conditions: list[Any]) -> None:
        judge.see(runs, conditions)
        tripwire.set = True

    runs = measure(tiny, rows, SAMPLING, see)
    tripwire.set = False
    told = failures(runs)
    assert list(told) == ["Tea", "Tea+AdaCorrection", "None[steps of Tea]"]
    assert set(told.values()) == {"Tea: out of memory"}
    finished = [run for run in runs if run.left_out is None]
    assert [run.row.method for run in finished] == ["None", "Tea[taylor-1]"]
    results = judge.results(finished, {})
    assert [len(run.images) for run in finished] == [2, 2] and results[1]["psnr"]["value"] > 10
    assert judge.comparisons(finished) == []


def test_a_row_that_cannot_begin_is_told_of(tiny: LoadedPipeline, tmp_path: Path) -> None:
    none, tea, *_, corrected, _ = tea_rows(HITS)
    runs = measure(tiny, [none, tea, replace(corrected, trajectory=tmp_path / "gone.safetensors")], SAMPLING)
    assert list(failures(runs)) == [corrected.method]
    assert "gone.safetensors" in failures(runs)[corrected.method]


def test_an_uncached_row_that_fails_ends_the_run(tiny: LoadedPipeline, tripwire: Tripwire) -> None:
    tripwire.set = True
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(tiny, tea_rows(HITS), SAMPLING)


def test_a_cache_that_never_hits_is_marked(tiny: LoadedPipeline) -> None:
    rows, judge = tea_rows(NEVER_HITS), Judge(tiny, None)
    runs = measure(tiny, rows, replace(SAMPLING, batch_size=2), judge.see)
    assert failures(runs) == {}
    assert [run.row.method for run in runs if run.inactive] == [row.method for row in rows[1:]]
    document = {"results": judge.results(runs, {})}
    assert exit_code(document) == 3
    assert [row["hit_rate"] for row in document["results"]] == [0.0] * len(rows)
    assert len(remarks(document)) == len(rows) - 1
    assert judge.comparisons(runs) == []


def run_main(command: Any, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    common = f"--num_images 2 --batch_size 2 --num_inference_steps 6 --output_dir {folder}"
    monkeypatch.setattr(sys, "argv", ["benchmark", *line.split(), *common.split()])
    with pytest.raises(SystemExit) as caught:
        command.main()
    return caught.value.code


def test_the_comparison_writes_everything_and_ends_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--cache_methods Tea Interval --cache_ratio_threshold 0 --interval 2"
    assert run_main(cache_execute, line, tmp_path, monkeypatch) == 3
    rows = {row["method"]: row for row in json.loads((tmp_path / cache_execute.RESULTS).read_text())["results"]}
    assert list(rows) == ["None", "Tea", "Interval"]
    assert rows["Tea"]["inactive"].startswith("Tea: it never hit") and rows["Interval"]["inactive"] is None
    assert rows["Interval"]["psnr"] is not None and len(rows["Tea"]["images"]) == 2
    said = capsys.readouterr().out
    assert f"inactive: {rows['Tea']['inactive']}" in said.splitlines()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert rows["Tea"]["inactive"] in page


def test_the_table_of_gamma_is_written_where_the_base_never_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "--use_cache Tea --rel_l1_thresh 0 --adacorr_tolerance 0.2"
    assert run_main(sensitivity, line, tmp_path, monkeypatch) == 3
    document = json.loads((tmp_path / sensitivity.RESULTS).read_text())
    assert [row["method"] for row in document["results"]][:2] == ["None", "Tea"]
    assert document["results"][1]["inactive"] and document["failures"] == {}
    assert "inactive: Tea: it never hit" in (tmp_path / sensitivity.MARKDOWN).read_text()


def test_a_sweep_without_a_point_is_no_success() -> None:
    document = {"results": [{"method": "None"}], "failures": {}, "sweep": {"left_out": {}, "empty": ["Fast"]}}
    assert exit_code(document) == 3 and "Fast" in remarks(document)[0]
    assert exit_code(document | {"failures": {"Tea": "Tea: no"}}) == 1
    assert exit_code({"results": [{"method": "None", "inactive": None}]}) == 0


def test_a_peer_that_fails_midway_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: LoadedPipeline
) -> None:
    monkeypatch.setattr(peers, "FINE_STEPS", 2)

    def trips(subject: Subject) -> Attached:
        wire, calls = Tripwire(subject.transformer), []

        def before() -> None:  # the warm-up and the first batch, then the second
            calls.append(1)
            wire.set = len(calls) == 3

        return Attached(before=before)

    def refuses(subject: Subject) -> Attached:
        raise LookupError("no such block")

    rows = [
        Peer("broken", "x", {"x": 1}, trips),
        Peer("foreign", "x", {"x": 2}, refuses),
        Peer("idle", "x", {"x": 3}, lambda subject: Attached()),
        Peer("fewer", "x", {"x": 4}, lambda subject: Attached(), steps=1),
    ]
    comparison = peers.Comparison(replace(SAMPLING, num_inference_steps=2), tmp_path, tiny.pipeline.device, [])
    comparison.run(rows)
    document = json.loads((tmp_path / "peers.json").read_text())
    found = {row["row"]: row for row in document["results"]}
    assert found["broken"]["does_not_run"] == "fails in batch 2 of 2: RuntimeError: out of memory"
    assert document["failures"] == {"broken": found["broken"]["does_not_run"]}
    assert found["foreign"]["does_not_run"] == "does not run: LookupError: no such block"
    assert found["idle"]["inactive"] and found["fewer"]["inactive"] is None
    assert found["fewer"]["compute"] == pytest.approx(0.5)
    assert exit_code(document) == 1 and exit_code(document | {"failures": {}}) == 3
