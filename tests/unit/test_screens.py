"""What `xdit generate` shows at its end, on a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toys import Toy, attached

from benchmark import cache_execute
from benchmark.common import describe_run, sampling_of
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline
from xfuser.model_executor.pipelines.screens import print_summary

STEPS = 50


def shown(cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    document = {"model": "tiny-dit", "images": ["a"], "generated": 1, "seconds": 2.0, "cache": cache}
    print_summary(document, Path("out"))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("family", ["dit"])
def test_no_cache_shows_no_approximation(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with attached(toy.pipeline, "pipeline", None) as engine:
        toy.images(4)
        summary = engine.summary()
    assert summary["approximation"] is None
    text = "\n".join(shown(summary, monkeypatch, capsys))
    assert "base method" in text and not any(word in text for word in ("approximation", "hit rate", "█"))


@pytest.mark.parametrize("family", ["dit"])
def test_the_plan_of_50_steps_is_one_line_of_80_columns(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with attached(toy.pipeline, "pipeline", "Interval", interval=2) as engine:
        toy.images(STEPS)
        lines = shown(engine.summary(), monkeypatch, capsys)
    (plan,) = (line for line in lines if line and set(line) <= set("█▄·"))
    assert len(plan) == STEPS and {"█", "·"} <= set(plan)
    assert max(map(len, lines)) <= 80


def test_the_trajectorys_plan_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    strip = "█·▄··" * 10
    cache = {
        "method": "trajectory",
        "asked": {"target_speedup": 3.0},
        "evaluated_share": 0.3,
        "steps": STEPS,
        "predicted": None,
        "got": {"speedup": None},
        "images_known": 16,
        "generations": 12,
        "learned_generations": 1,
        "strip": strip,
        "non_finite": 3,
        "not_learned_because": None,
    }
    lines = shown(cache, monkeypatch, capsys)
    assert strip in lines and max(map(len, lines)) <= 80


@pytest.fixture(scope="module")
def tiny() -> LoadedPipeline:
    return load_pipeline("tiny-dit")


def test_a_report_names_prompts_where_the_model_takes_them(tiny: LoadedPipeline) -> None:
    def settings(model_type: str, *more: str) -> dict[str, Any]:
        sampling = sampling_of(cache_execute.parser().parse_args(["--model_type", model_type, *more]))
        loaded = tiny if model_type == "tiny-dit" else load_pipeline(model_type)
        return describe_run(loaded, sampling)["settings"]

    assert not {"prompts", "height", "width"} & settings("tiny-dit").keys()
    assert settings("flux", "--prompt", "a fox")["prompts"] == ["a fox"]
    assert len(settings("flux")["prompts"]) == 4
    for flag in ("--prompt", "--height"):
        with pytest.raises(ValueError, match=f"{flag}: --model_type tiny-dit takes class labels"):
            settings("tiny-dit", flag, "64")
