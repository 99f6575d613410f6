"""Rows that must save as many FLOPs as their base method: the search, the books, and real runs of tiny-dit."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmark import cache_execute
from benchmark.judge import Judge
from benchmark.matching import ALLOWED, SEARCH_LIMIT, BudgetDial, Dial, Found, Match, ToleranceDial, search
from benchmark.measure import Sampling, measure
from benchmark.outcomes import Run
from benchmark.rows import Correction, Row, rows_of, uncached
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline


@dataclass(frozen=True)
class Trial:
    saved: float


def find(target: float, saves: object, start: float = math.log(0.02), close: float = 0.0025) -> Found[Trial]:
    dial = ToleranceDial()
    return search(dial, start, dial.step, target, close, SEARCH_LIMIT, lambda position: Trial(saves(position)))


def logistic(position: float) -> float:
    """Half is saved at a tolerance of 0.1."""
    return 1 / (1 + math.exp(math.log(0.1) - position))


@pytest.mark.parametrize("target", [0.05, 0.2, 0.5, 0.8, 0.95])
def test_the_search_finds_a_tolerance(target: float) -> None:
    found = find(target, logistic)
    assert found.attempt.saved == pytest.approx(target, abs=0.005)
    assert logistic(found.position) == found.attempt.saved


def test_the_search_stops_where_it_is_close_enough_and_returns_the_closest() -> None:
    tried: list[float] = []

    def steps(position: float) -> float:
        tried.append(position)
        return 0.3 if position < 0 else 0.7

    found = find(0.6, steps, close=0.15)
    assert found.attempt.saved == 0.7 and len(tried) < SEARCH_LIMIT
    tried.clear()
    assert find(0.6, steps).attempt.saved == 0.7
    assert len(tried) <= SEARCH_LIMIT


def test_the_search_says_when_there_is_nothing_on_the_other_side() -> None:
    found = find(0.9, lambda position: min(logistic(position), 0.6))
    assert not found.bracketed and found.attempt.saved == 0.6


@pytest.mark.parametrize("steps", [10, 16, 20])
def test_what_whole_steps_cannot_match_is_carried_over_to_the_next_batch(steps: int) -> None:
    """A budget is spent in whole steps; a base method of single blocks saves anything in between."""
    match, sizes, base = Match(BudgetDial()), (4, 4, 4, 4, 4, 4, 4, 2), 0.4137
    for size in sizes:
        position = match.dial.guess(match.needed(base, size), base, base)
        match.take(size, base, 1 - round(match.dial.value(position) * steps) / steps, match.dial.value(position))
    assert match.images == sum(sizes) and len(match.values) == len(sizes)
    assert match.holds and abs(match.reached - base) <= ALLOWED


def test_the_tolerance_follows_what_was_seen() -> None:
    dial: Dial = ToleranceDial()
    dial.seen += [(-4.0, 0.3), (-3.0, 0.4), (5.0, 0.9)]
    assert dial.guess(0.35, 0.5, 0.5) == pytest.approx(-3.5)
    assert dial.guess(0.37, 0.5, 0.5) == pytest.approx(-3.3)
    assert dial.guess(0.8, 0.5, 0.5) > -3.0
    assert not Match(dial).holds


@pytest.fixture(scope="module")
def tiny() -> LoadedPipeline:
    return load_pipeline("tiny-dit")


def tea_and(*modes: str, threshold: float = 0.1) -> list[Row]:
    """Tea, and its correction in each of the modes, named after it."""
    settings = {"use_cache": "Tea", "rel_l1_thresh": threshold}
    rows = [uncached()]
    for mode in modes:
        correction = Correction({"enable_adacorrection": True, "adacorr_mode": mode}, match_compute=True)
        plain, _, corrected, _ = rows_of("Tea", settings, True, correction)
        rows += [plain] * (len(rows) == 1) + [replace(corrected, method=mode)]
    return rows


@pytest.fixture(scope="module")
def matched(tiny: LoadedPipeline) -> dict[str, Run]:
    judge = Judge(tiny, None)
    runs = measure(tiny, tea_and("budget", "gate", "bound", threshold=0.15), Sampling(8, 2, 10, 1.5, 42), judge.see)
    for run, result in zip(runs, judge.results(runs, {}), strict=True):
        run.summary["result"] = result
    return {run.row.method: run for run in runs}


@pytest.mark.parametrize("mode", ["budget", "gate", "bound"])
def test_every_mode_saves_what_its_base_saves(matched: dict[str, Run], mode: str) -> None:
    base, result = matched["Tea"].summary["result"], matched[mode].summary["result"]
    assert base["flops_saved"] > 0.2 and "matched_compute" not in base
    assert abs(result["flops_saved"] - base["flops_saved"]) <= ALLOWED
    told = result["matched_compute"]
    assert told["target"] == pytest.approx(base["flops_saved"])
    assert told["reached"] == pytest.approx(result["flops_saved"])
    assert told["setting"] == ("adacorr_budget" if mode == "budget" else "adacorr_tolerance")
    assert len(told["values"]) == 4
    said = result["settings"][told["setting"]]
    assert said.startswith(f"{min(told['values']):.4g}") and said.endswith("searched to save as many FLOPs as Tea")


def test_a_swept_rows_images_are_scored_and_not_kept(tiny: LoadedPipeline) -> None:
    judge, rows = Judge(tiny, None), tea_and("budget", threshold=0.5)[:2]
    runs = measure(tiny, [rows[0], replace(rows[1], kept=False)], Sampling(3, 1, 6, 1.5, 1), judge.see)
    assert [len(run.images) for run in runs] == [3, 1]
    assert all(result["images"] == [] for result in judge.results(runs, {}))
    assert judge.results(runs, {})[1]["psnr"]["value"] > 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        # All steps but the first and the last are skipped, and the bound needs to see more of them.
        (
            "--cache_methods Tea+AdaCorrection --adacorr_mode bound --cache_ratio_threshold 100",
            ("no setting matches", "Tea+AdaCorrection", "adacorr_tolerance=", "0.7"),
        ),
        # A single batch of few steps: whole ones cannot save what single blocks saved.
        (
            "--cache_methods Fast+AdaCorrection --adacorr_mode budget --cache_ratio_threshold 0.1",
            ("more than 0.01 apart", "Fast+AdaCorrection", "--num_images"),
        ),
    ],
    ids=["out of reach", "in between"],
)
def test_a_match_that_is_not_reached_fails_in_one_line(
    options: str,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = f"--match_compute --num_images 1 --batch_size 1 --num_inference_steps 8 --output_dir {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["cache_execute.py", *options.split(), *common.split()])
    with pytest.raises(SystemExit) as caught:
        cache_execute.main()
    assert caught.value.code == 1
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert all(word in said for word in words), said
    document = json.loads((tmp_path / cache_execute.RESULTS).read_text())
    (failed,) = document["failures"]
    assert failed.endswith("+AdaCorrection")
    assert f"None[steps of {failed.split('+')[0]}]" in [row["method"] for row in document["results"]]


def test_matching_needs_something_corrected() -> None:
    args = cache_execute.parser().parse_args(["--cache_methods", "Tea", "--match_compute"])
    with pytest.raises(ValueError, match="--match_compute"):
        cache_execute.rows_to_run(args)
