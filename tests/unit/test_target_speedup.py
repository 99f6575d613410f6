"""benchmark/target_speedup.py: what a row tells of a short run."""

from __future__ import annotations

import pytest

from benchmark.measure import Sampling
from benchmark.target_speedup import measure, table_of
from xfuser.model_executor.pipelines import load_pipeline


@pytest.mark.parametrize("settings", [{"target_speedup": 2.0}, {"adacorr_budget": 1.0}])
def test_a_row_of_a_short_run(settings: dict[str, float]) -> None:
    plain, cached = (load_pipeline("tiny-dit") for _ in range(2))
    row = measure(plain, cached, settings, Sampling(2, 2, 8, 1.5, 7), pairs=1)
    assert row["first_call_exact"] and row["first_call"] > 0 and len(row["call"]) == 1
    skips = "target_speedup" in settings
    assert (row["got"]["budget"] < 1) == skips and bool(row["predicted"]) == skips
    (name,) = settings
    assert f"{name} {settings[name]:g}" in list(table_of([row], "title").columns[0].cells)
