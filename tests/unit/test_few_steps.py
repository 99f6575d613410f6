"""One step, and a few: nothing to reuse, nothing to learn from, and no traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import Toy, attached

from xfuser import xFuserArgs
from xfuser.cli import main
from xfuser.config import FlexibleArgumentParser, InputConfig
from xfuser.core.distributed import get_runtime_state
from xfuser.model_executor.adapters.pixart import build_small as build_toy_pixart
from xfuser.xdit.pipelines import xFuserPixArtAlphaPipeline


@pytest.mark.parametrize("level", ["blocks", "trajectory"])
def test_calibrating_one_step_is_refused(level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--level", level, "--num_inference_steps", "1", "--output", str(tmp_path / "a.safetensors")]
    with pytest.raises(SystemExit):
        main(["calibrate", "--num_images", "1", *arguments])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xdit calibrate:")]
    assert len(told) == 1 and "--num_inference_steps 1: one step reuses nothing" in told[0]
    assert not list(tmp_path.iterdir())


def test_recording_one_step_is_refused(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", None) as engine:
        engine.record()
        with pytest.raises(ValueError, match="at least 2 steps"):
            dit.images(1)
        dit.images(2)
        assert engine.recorded().steps == 2


def test_first_learns_nothing_from_one_step(dit: Toy) -> None:
    """Every image is evaluated in full, and a longer generation is learned from as ever."""
    settings: dict[str, Any] = {"enable_adacorrection": True, "rel_l1_thresh": 0.3, "calibration": "first"}
    with attached(dit.pipeline, "pipeline", "Tea", **settings) as engine:
        for seed in range(3):
            assert np.array_equal(dit.images(1, seed=seed), dit.images(1, seed=seed))
        assert not engine.summary()["calibrated"]
        for seed in range(2):
            dit.images(6, seed=seed)
        assert engine.summary()["calibrated"]


@pytest.mark.parametrize("steps", [2, 3])
def test_budgets_below_one_evaluation_are_learned_as_one(steps: int, tmp_path: Path) -> None:
    """The command's own budgets go down to 16% of the evaluations."""
    path = tmp_path / "few.safetensors"
    arguments = ["--num_images", "1", "--num_inference_steps", str(steps), "--threads", "1", "--output", str(path)]
    main(["calibrate", "--level", "trajectory", *arguments])
    assert path.is_file()


@pytest.mark.parametrize("steps", [1, 3])
def test_pixart_alpha_warms_up_with_two_steps_at_least(steps: int) -> None:
    """Diffusers' pipeline takes a single step for that of a distilled model, which has its own scheduler."""
    parsed = xFuserArgs.add_cli_args(FlexibleArgumentParser(prog="script")).parse_args(["--model", "somewhere"])
    engine_config, _ = xFuserArgs.from_cli_args(parsed).create_config()
    pipe = xFuserPixArtAlphaPipeline(build_toy_pixart(), engine_config)
    pipe.set_progress_bar_config(disable=True)
    counted: list[int] = []
    hook = pipe.transformer.register_forward_hook(lambda *_: counted.append(1))
    settings: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "np"}
    try:
        pipe.prepare_run(InputConfig(prompt="", num_inference_steps=8, **settings), steps=steps)
    finally:
        hook.remove()
        pipe.parallel.remove()
        get_runtime_state().destroy_distributed_env()
    assert len(counted) == max(2, steps)
