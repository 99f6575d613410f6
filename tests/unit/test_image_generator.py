"""`ImageGenerator` by itself: rows in, images out, whatever came before, and one calibration for all."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray")

from xfuser.model_executor.pipelines.loading import load_pipeline  # noqa: E402
from xfuser.ray import ImageGenerator  # noqa: E402

STEPS = 6
ROWS = {"id": np.array(["a", "b"]), "class_label": np.array([1, 8]), "seed": np.array([5, 6])}
OTHERS = {"class_label": np.array(["bag", "dress"]), "seed": np.array([50, 60])}


def generator(**settings: Any) -> ImageGenerator:
    return ImageGenerator("tiny-dit", num_inference_steps=STEPS, threads=1, **settings)


def decoded(made: dict[str, Any]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in made["image"]])


def test_without_a_cache_the_images_are_the_pipelines() -> None:
    made = generator()(ROWS)
    pixels = load_pipeline("tiny-dit").generate([1, 8], [5, 6], STEPS)
    assert np.array_equal(decoded(made), np.round(pixels * 255).astype(np.uint8).squeeze())
    assert list(made["id"]) == ["a", "b"] and list(made["evaluated_share"]) == [1.0, 1.0]


@pytest.mark.parametrize("cache", [{"use_cache": "Tea", "rel_l1_thresh": 0.2}, {"adacorr_budget": 0.5}])
def test_images_do_not_depend_on_what_came_before(cache: dict[str, Any]) -> None:
    one = generator(cache=cache)
    calibration = one.learn(OTHERS)
    first = one(ROWS)
    one(OTHERS)
    assert one(ROWS)["image_sha256"].tolist() == first["image_sha256"].tolist()
    assert 0 < first["evaluated_share"][0] < 1
    another = generator(cache=cache, calibration=calibration)
    made = another(ROWS)
    assert made["image_sha256"].tolist() == first["image_sha256"].tolist()
    assert made["plan_digest"].tolist() == first["plan_digest"].tolist()


def test_a_generator_that_is_told_of_another_kind_learns_nothing_by_itself() -> None:
    one = generator(cache={"adacorr_budget": 0.5})
    another = generator(cache={"adacorr_budget": 0.5}, calibration=one.learn(ROWS))
    with pytest.raises(RuntimeError, match="the job's does not fit"):
        another({**ROWS, "steps": np.array([8, 8])})


def test_what_cannot_be_is_refused_in_a_line() -> None:
    for settings, said in (
        ({"pipeline": "tinydit"}, "tiny-dit"),
        ({"parallel": {"data_parallel_degree": 2}}, "concurrency"),
        ({"cache": {"use_cache": "Tea", "calibration": "first"}}, "learns from another batch"),
        ({"cache": {"target_speedup": 0.5}}, "target_speedup"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            ImageGenerator(**settings)
        assert "\n" not in str(caught.value)
    one = generator()
    with pytest.raises(ValueError, match="the row 1 of a batch: 'class_label' 99"):
        one({"class_label": np.array([9, 99])})
    with pytest.raises(ValueError, match="the row with id 'b': 'class_label' 99"):
        one({"id": np.array(["a", "b"]), "class_label": np.array([9, 99])})


def test_rows_without_a_seed_have_their_own_in_every_batch() -> None:
    one = generator()
    rows = {"id": np.array(["x/1", "x/2"], dtype=object), "class_label": np.array([1, 1])}
    both, alone = one(rows), one({name: values[1:] for name, values in rows.items()})
    assert both["seed"][0] != both["seed"][1] == alone["seed"][0]
    assert both["image_sha256"][1] == alone["image_sha256"][0]
    gaps = one(rows | {"seed": np.array([np.nan, 7.0])})  # so Parquet's empty cells come
    assert gaps["seed"].tolist() == [both["seed"][0], 7]


def test_an_empty_batch_has_the_columns_of_others() -> None:
    made, empty = generator()(ROWS), generator()({name: values[:0] for name, values in ROWS.items()})
    assert list(empty) == list(made) and not len(empty["image"])
    assert [values.dtype.kind for values in empty.values()] == [values.dtype.kind for values in made.values()]
