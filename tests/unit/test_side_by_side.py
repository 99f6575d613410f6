"""benchmark/side_by_side.py: which rows there are, and what they are told to be."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from benchmark.side_by_side import picture_of, rows_of
from xfuser.model_executor.adapters.family import shipped
from xfuser.model_executor.pipelines import load_pipeline


@pytest.mark.skipif(not shipped("tiny-flux").is_dir(), reason="tiny-flux's weights are not in this checkout")
def test_rows_of_a_prompt() -> None:
    loaded = load_pipeline("tiny-flux")
    rows = rows_of(loaded, ["red apple"], 3, 28, [2.0])
    names = [name.split("\n")[:2] for name, _ in rows]
    assert names == [["no cache", "28 steps"], ["AdaCorrection", "14 of 28 steps"], ["no cache", "14 steps"]]
    near, fewer = (np.abs(images - rows[0][1]).mean() for _, images in rows[1:])
    assert 0 < near < fewer
    assert np.array_equal(loaded.generate(["red apple"], [3], 28), rows[0][1])
    with Image.open(io.BytesIO(picture_of(rows, ["red apple"]))) as picture:
        assert picture.format == "PNG"
    with pytest.raises(ValueError, match="no calibration for 9 steps"):
        rows_of(loaded, ["red apple"], 3, 9, [2.0])
