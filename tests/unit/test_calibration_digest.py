"""What ranks compare of a calibration, and what becomes of one that cannot be stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toys import Toy

from xfuser import apply_cache_on_pipeline
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration

STEPS = 6


def learned(toy: Toy, store: Path) -> tuple[Calibration, np.ndarray]:
    engine = apply_cache_on_pipeline(toy.pipeline, adacorr_budget=0.5, store=store)
    try:
        images = toy.images(STEPS)
        assert engine.calibration is not None
        return engine.calibration, images
    finally:
        engine.remove()


def test_the_digest_is_that_of_what_decides(dit: Toy, tmp_path: Path) -> None:
    """A file has it too, whether or not more can be learned into it; the smallest change of a weight changes it."""
    calibration, _ = learned(dit, tmp_path)
    digest = calibration.digest()
    for compact in (False, True):
        calibration.save(tmp_path / "saved.safetensors", compact)
        assert Calibration.load(tmp_path / "saved.safetensors").digest() == digest
    weights = next(iter(calibration.learned.values())).weights[-1]
    kept = weights[0].clone()
    weights[0] = torch.nextafter(kept, torch.tensor(torch.inf, dtype=kept.dtype))
    assert calibration.digest() != digest
    weights[0] = kept
    assert calibration.digest() == digest
    calibration.timing["outside"] += 1e-9  # a speed-up is chosen by it
    assert calibration.digest() != digest


def test_a_store_that_cannot_be_written_loses_no_image(
    dit: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where several ranks share an image, only the first of them stores; the others would go on without it."""
    plain = dit.plain_images(STEPS)
    (tmp_path / "file").write_text("")
    _, images = learned(dit, tmp_path / "file")
    assert np.array_equal(images, plain)
    assert [record.getMessage() for record in caplog.records if "cannot be stored" in record.getMessage()]
