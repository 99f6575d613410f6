"""What the check runs, and when it calls a row passed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmark.gpu_check import Check, checks, judged, reason
from xfuser.config import ParallelConfig

CPU, OTHER = torch.device("cpu"), torch.device("meta")
ROW = {"cache": "Fb", "digests_equal": True, "finite": True, "same_plan": True, "relative": 1e-6, "graphs": 0}


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7, 8, 64])
def test_every_mesh_that_is_run_fits(processes: int) -> None:
    for check in checks(processes, 24, 57, compile_too=True):
        if check.impossible is None:
            config = ParallelConfig(**check.degrees)
            config.check_world(check.processes)
            config.check_model(24, 57)


def test_one_device_runs_no_parallel_row() -> None:
    run = [check.name for check in checks(1, 24, 57, compile_too=False) if check.impossible is None]
    assert run == ["one process", "one process, guidance"]


@pytest.mark.parametrize(
    "check, changed, why",
    [
        (Check("x", 2), {}, None),
        (Check("x", 2), {"relative": 0.01}, "relative error 0.01, at most 0.001 allowed"),
        (Check("x", 2), {"relative": float("nan")}, "relative error nan"),
        (Check("x", 2), {"digests_equal": False}, "different plans"),
        (Check("x", 2), {"finite": False}, "not finite"),
        (Check("x", 2, displaced=True), {"relative": 0.01}, None),
        (Check("x", 2), {"relative": 0.01, "same_plan": False}, None),
        (Check("x", 2), {"relative": 0.01, "same_plan": False, "cache": "none"}, "relative error"),
        (Check("x", 2, compile=True), {}, "torch compiled nothing"),
        (Check("x", 2, compile=True), {"graphs": 3}, None),
    ],
)
def test_verdict(check: Check, changed: dict[str, Any], why: str | None) -> None:
    row = judged(check, ROW | changed, CPU)
    assert row.passed is (why is None)
    assert why is None or why in row.why


def test_half_precision_may_differ_more() -> None:
    assert judged(Check("x", 2), ROW | {"relative": 0.01}, OTHER).passed


def test_reason_is_the_first_error() -> None:
    log = "Traceback\n[rank1]: ValueError: heads do not fit\nfoo\ntorch.distributed.DistBackendError: peer left\n"
    assert reason(log, 1) == "ValueError: heads do not fit"
    assert reason("nothing", 3) == "exit code 3"
