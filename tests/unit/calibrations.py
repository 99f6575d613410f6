"""Small calibrations for the tests, and what a refusal has to look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Toy, attached

from xfuser.model_executor.cache.calibration.linear import maps_in
from xfuser.model_executor.cache.calibration.store import Calibration

STEPS = 8
FITTED = {"approximation": "fitted", "rel_l1_thresh": 0.15}


def calibration_of(histories: torch.Tensor, outputs: torch.Tensor) -> Calibration:
    """From residuals [rows, steps, n] and outputs alike."""
    histories, outputs = histories.double(), outputs.double()
    gram = histories @ histories.transpose(1, 2)
    return Calibration(gram, outputs.square().sum(2), {}, {})


def with_sections(
    gram: torch.Tensor, noise: tuple[float, ...], maps: dict[tuple[int, int], torch.Tensor] | None = None
) -> Calibration:
    """With FastCache's noise, TeaCache's identity and some linear maps, and nothing to fit weights from."""
    sections = {
        "Fast": {"noise": torch.tensor(noise, dtype=torch.float64)},
        "Tea": {"polynomial": torch.tensor((1.0, 0.0), dtype=torch.float64)},
        "linear": {f"{block}.{stream}": matrix for (block, stream), matrix in (maps or {}).items()},
    }
    return Calibration(gram, gram[..., 0].clone(), sections, {})


def noise_of(calibration: Calibration) -> tuple[float, ...]:
    return tuple(calibration.sections["Fast"]["noise"].tolist())


def polynomial_of(calibration: Calibration) -> tuple[float, ...]:
    return tuple(calibration.sections["Tea"]["polynomial"].tolist())


def maps_of(calibration: Calibration) -> dict[tuple[int, int], torch.Tensor]:
    return maps_in(calibration.sections["linear"])


def recorded(toy: Toy, steps: int = STEPS, seeds: tuple[int, ...] = (0,), batch: int = 1) -> Calibration:
    with attached(toy.pipeline, "pipeline", None) as engine:
        engine.record()
        for seed in seeds:
            toy.images(steps, batch=batch, seed=seed)
        return engine.recorded()


@pytest.fixture(scope="module")
def once() -> Callable[[Toy], Calibration]:
    """Each family's calibration, recorded once."""
    known: dict[str, Calibration] = {}

    def of(toy: Toy) -> Calibration:
        if toy.family not in known:
            known[toy.family] = recorded(toy)
        return known[toy.family]

    return of


@pytest.fixture
def saved(dit: Toy, once: Callable[[Toy], Calibration], tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    once(dit).save(path)
    return path


def refused(apply: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        apply()
    text = str(caught.value)
    assert text and "\n" not in text
    for word in ("calibration", *words):
        assert word in text
