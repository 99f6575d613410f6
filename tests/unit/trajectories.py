"""What tests of the trajectory share: tiny-dit, images of it, and a store of each test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xfuser import apply_cache_on_pipeline, load_pipeline

STEPS = 12


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_pipeline("tiny-dit").pipeline


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def draw(pipeline: Any, seed: int = 0, images: int = 2, steps: int = STEPS, guidance: float = 1.5, **more: Any) -> Any:
    torch.manual_seed(seed)  # DiTPipeline gives its generators to the first noise only
    generators = [torch.Generator().manual_seed(seed + index) for index in range(images)]
    labels = [index % 10 for index in range(images)]
    call = {"generator": generators, "num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    return pipeline(labels, **call, **more).images


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    errors = np.square(images - reference).reshape(len(images), -1).mean(axis=1)
    return float(np.mean(10 * np.log10(1 / np.maximum(errors, 1e-12))))


class Calls:
    """Counts the rows that a denoiser evaluates, beneath whatever is attached."""

    def __init__(self, pipeline: Any) -> None:
        self.rows: list[int] = []
        self._hook = pipeline.transformer.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows.append((args[0] if args else kwargs["hidden_states"]).shape[0])

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


@pytest.fixture
def attached(tiny: Any) -> Iterator[Any]:
    engine = apply_cache_on_pipeline(tiny, adacorr_budget=0.5)
    yield engine
    engine.remove()
