"""`ImageGenerator` under Ray Data: the documentation's example, with a group of two ranks."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import run
from PIL import Image

pytest.importorskip("ray")
import pyarrow.parquet  # noqa: E402 (comes with Ray)

pytestmark = pytest.mark.slow
HELPER = Path(__file__).with_name("ray_helpers") / "map_batches.py"


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pyarrow.parquet.read_table(path).to_pylist()}


def decoded(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"])), dtype=int)


def test_parquet_in_is_parquet_out_and_the_images_are_those_of_one_process(tmp_path: Path) -> None:
    done = run(HELPER, tmp_path, limit=290, RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    assert done.code == 0, done.err[-3000:]
    mapped, direct = by_id(tmp_path / "images"), by_id(tmp_path / "direct.parquet")
    assert len(mapped) == 12 and mapped.keys() == direct.keys()
    for name, row in mapped.items():
        assert row["note"] == "kept" and row["evaluated_share"] == 0.5
        assert row["image_sha256"] == hashlib.sha256(row["image"]).hexdigest()
        assert (row["seed"], row["plan_digest"]) == (direct[name]["seed"], direct[name]["plan_digest"])
        assert np.abs(decoded(row) - decoded(direct[name])).max() <= 1  # of 255: two ranks add in another order
