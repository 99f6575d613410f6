"""The model of a batch job: it finds what can be worked out by hand, and loses nothing where groups are lost."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from benchmark.batch_simulation import Case, Measured, Simulation, replay, row, scaled, verdict

ROOT = Path(__file__).resolve().parents[2]


def measured(**more: float) -> Measured:
    plain = {"images": 160, "batches": [2.0] * 10, "writes": [0.1], "groups": 2, "starts": [5.0], "learning": 0.0}
    return Measured(**plain | {"driver": 0.0, "row_bytes": 400.0, "job": 15.1} | more)  # type: ignore[arg-type]


def test_equal_batches_take_what_one_can_work_out() -> None:
    """Two groups start in 5 s, make five batches of 2 s each, and the last is written in 0.1 s."""
    assert replay(measured()) == (pytest.approx(15.1), pytest.approx(0.0))


def test_all_wait_for_the_calibration() -> None:
    assert replay(measured(learning=3.0))[0] == pytest.approx(18.1)


def test_a_driver_that_is_full_decides_how_long_it_takes() -> None:
    seen = Simulation(Case(1000, 100, [0.0], [1.0], [0.0], driver=0.1)).run()
    assert seen.finish >= 100 and seen.driver_busy / seen.finish > 0.9
    rows = [row(Case(1000, 100, [0.0], [1.0], [0.0]), seen, measured(driver=0.1), 16_000)]
    assert verdict(rows, measured(driver=0.1)).startswith("The driver breaks first: it is full from 100 groups on")


@pytest.mark.parametrize("seed", range(5))
def test_lost_groups_cost_time_and_no_batch(seed: int) -> None:
    case = Case(300, 4, [3.0], [1.0, 2.0], [0.1], mean_hours=30 / 3600, seed=seed)
    seen = Simulation(case).run()
    calm = Simulation(Case(300, 4, [3.0], [1.0, 2.0], [0.1], seed=seed)).run()
    assert seen.losses > 0 and seen.repeated > 0
    assert seen.finish > calm.finish and 300 <= seen.busy <= 600  # each batch counted once


def test_more_groups_are_faster_by_as_much() -> None:
    args = argparse.Namespace(
        batch_size=None, batch_seconds=None, start_seconds=None, prompts=32_000, mean_hours=1e6, seed=0
    )
    one, ten = (Simulation(scaled(measured(), args, groups)).run().finish for groups in (1, 10))
    assert one / ten == pytest.approx(10, rel=0.02)


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    source = (ROOT / "xfuser" / "ray" / "batch" / "metrics.py").read_text()
    known = set(re.findall(r'"(xfuser_batch_\w+)"', source))
    shown = (ROOT / "scripts" / "grafana_batch.json").read_text()
    json.loads(shown)
    named = {re.sub("_(total|bucket)$", "", each) for each in re.findall(r"ray_(xfuser_batch_\w+)", shown)}
    assert named == known
    documented = (ROOT / "docs" / "cluster.md").read_text()
    assert all(f"`{each}`" in documented for each in known)
