"""What is attached twice, or taken off twice. That taking it off leaves no trace: test_conformance."""

from __future__ import annotations

import numpy as np
import pytest
from toys import ALWAYS, LEVELS, Toy, attached

from xfuser.model_executor.adapters.dit import build_small as build_toy_dit
from xfuser.model_executor.cache import apply_cache_on_pipeline, apply_cache_on_transformer


@pytest.mark.parametrize("second", LEVELS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_second_application_is_refused_and_harms_nothing(dit: Toy, level: str, second: str) -> None:
    with attached(dit.pipeline, level, "Tea", rel_l1_thresh=ALWAYS) as engine:
        expected, plan = dit.images(4), engine.summary()["plan"]
    with attached(dit.pipeline, level, "Tea", rel_l1_thresh=ALWAYS) as engine:
        with pytest.raises(ValueError, match="remove"):
            if second == "pipeline":
                apply_cache_on_pipeline(dit.pipeline, "Fb")
            else:
                apply_cache_on_transformer(dit.transformer, "Fb")
        assert np.array_equal(dit.images(4), expected)
        assert engine.summary()["plan"] == plan


def test_a_scheduler_that_two_pipelines_share(dit: Toy) -> None:
    other = build_toy_dit(seed=1)
    other.scheduler = dit.scheduler
    with attached(dit.pipeline, "pipeline", "Tea"):
        with pytest.raises(ValueError, match="scheduler"):
            apply_cache_on_pipeline(other, "Tea")
        assert "forward" not in vars(other.transformer)


def test_removing_twice_is_harmless(dit: Toy) -> None:
    with attached(dit.pipeline, "pipeline", "Fb") as engine:
        engine.remove()
        engine.remove()
