"""Files of calibrations: what they hold, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import STEPS, maps_of, noise_of, polynomial_of, refused
from diffusers import DDPMScheduler, DiTPipeline
from safetensors.torch import load_file, save_file
from toys import Toy, attached

from xfuser.model_executor.adapters.dit import build_small as build_toy_dit
from xfuser.model_executor.cache import apply_cache_on_pipeline, apply_cache_on_transformer
from xfuser.model_executor.cache.calibration.store import Calibration
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit

# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_holds_what_was_recorded(flux: Toy, once: Callable[[Toy], Calibration], tmp_path: Path) -> None:
    calibration = once(flux)
    path = tmp_path / "deeper" / "a.b.safetensors"
    calibration.save(path)
    assert sorted(each.name for each in path.parent.iterdir()) == ["a.b.json", "a.b.safetensors"]
    loaded = Calibration.load(path)
    assert torch.equal(loaded.gram, calibration.gram) and torch.equal(loaded.output_square, calibration.output_square)
    assert (noise_of(loaded), polynomial_of(loaded), loaded.provenance) == (
        noise_of(calibration),
        polynomial_of(calibration),
        json.loads(json.dumps(calibration.provenance)),
    )
    # Maps of both streams, in half precision.
    assert set(maps_of(loaded)) == {(block, stream) for block in range(len(flux.blocks)) for stream in (0, 1)}
    for key, matrix in maps_of(loaded).items():
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix, maps_of(calibration)[key], rtol=1e-3, atol=1e-4)
    calibration.save(path)
    assert calibration.provenance["num_steps"] == STEPS and calibration.provenance["scheduler"]


def test_a_file_of_the_first_schema_is_read(dit: Toy, once: Callable[[Toy], Calibration], tmp_path: Path) -> None:
    """It had no sections: each method's tensors had names of their own."""
    calibration = once(dit)
    old = {"gram": calibration.gram, "output_square": calibration.output_square}
    old |= {"noise": calibration.sections["Fast"]["noise"], "tea": calibration.sections["Tea"]["polynomial"]}
    old |= {f"maps.{name}": matrix.half().contiguous() for name, matrix in calibration.sections["linear"].items()}
    path = tmp_path / "old.safetensors"
    save_file(old, path)
    path.with_suffix(".json").write_text(json.dumps({"schema": 1, **calibration.provenance}))
    loaded = Calibration.load(path)
    assert torch.equal(loaded.gram, calibration.gram) and loaded.provenance == calibration.provenance
    assert (noise_of(loaded), polynomial_of(loaded)) == (noise_of(calibration), polynomial_of(calibration))
    assert maps_of(loaded).keys() == maps_of(calibration).keys()
    with attached(dit.pipeline, "pipeline", "Fast", calibration=path) as engine:
        dit.images(STEPS)
        assert engine.summary()["calibrated"] is True


@pytest.mark.parametrize("steps", [20, 30, 50])
def test_the_files_that_come_along_are_read(steps: int) -> None:
    loaded = Calibration.load(shipped_tiny_dit() / "calibration" / f"ddim-{steps}.safetensors")
    assert loaded.gram.shape == (14, steps, steps) and len(noise_of(loaded)) == 12 and len(maps_of(loaded)) == 12
    assert polynomial_of(loaded) != (1.0, 0.0)


def test_a_section_is_nobody_elses_business(dit: Toy, once: Callable[[Toy], Calibration], tmp_path: Path) -> None:
    """A method that this version does not know has left something in the file; it stays there, and nobody minds."""
    calibration = once(dit)
    own = {"a/b.c": torch.arange(3.0), "exact": torch.tensor([1 / 3], dtype=torch.float64)}
    path = tmp_path / "more.safetensors"
    replace(calibration, sections=calibration.sections | {"Other": own}).save(path)
    loaded = Calibration.load(path)
    assert torch.equal(loaded.sections["Other"]["a/b.c"], own["a/b.c"])
    assert torch.equal(loaded.sections["Other"]["exact"], own["exact"])
    apply_cache_on_pipeline(dit.pipeline, "Tea", calibration=path).remove()


def spoil_json(path: Path, text: str) -> None:
    path.with_suffix(".json").write_text(text)


def spoil_tensors(path: Path, **tensors: Any) -> None:
    held = load_file(path) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)


SPOILED: dict[str, Callable[[Path], Any]] = {
    "no file": lambda path: path.unlink(),
    "no description": lambda path: path.with_suffix(".json").unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no JSON": lambda path: spoil_json(path, "{"),
    "not UTF-8": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe{}"),
    "a list": lambda path: spoil_json(path, "[]"),
    "a number": lambda path: spoil_json(path, "3"),
    "no schema": lambda path: spoil_json(path, "{}"),
    "another schema": lambda path: spoil_json(path, '{"schema": 99}'),
    "nothing but the schema": lambda path: spoil_json(path, '{"schema": 1}'),
    "no Gram matrices": lambda path: spoil_tensors(path, gram=None),
    "a tensor that belongs to nothing": lambda path: spoil_tensors(path, stray=torch.zeros(1)),
    "of another model altogether": lambda path: spoil_tensors(path, **{"maps.a.b": torch.zeros(1)}),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_cannot_be_read_is_refused(dit: Toy, saved: Path, spoil: Callable[[Path], Any]) -> None:
    spoil(saved)
    refused(lambda: apply_cache_on_pipeline(dit.pipeline, "Fast", calibration=str(saved)), "xdit calibrate")
    assert "forward" not in vars(dit.transformer)


def test_another_model_is_refused(flux: Toy, saved: Path) -> None:
    apply = {"use_cache": "Fast", "calibration": str(saved)}
    refused(lambda: apply_cache_on_pipeline(flux.pipeline, **apply), "DiTTransformer2DModel", "FluxTransformer2DModel")
    refused(lambda: apply_cache_on_pipeline(build_toy_dit(layers=5), **apply), "blocks", "4", "5")
    refused(lambda: apply_cache_on_pipeline(build_toy_dit(seed=1), **apply), "weights")
    assert "forward" not in vars(flux.transformer)


def test_the_same_weights_in_half_precision_are_the_same_model(saved: Path) -> None:
    pipeline = build_toy_dit()
    pipeline.transformer.to(torch.bfloat16)
    apply_cache_on_pipeline(pipeline, "Fast", calibration=str(saved)).remove()


def test_another_scheduler_is_refused(dit: Toy, saved: Path) -> None:
    pipeline = DiTPipeline(dit.transformer, dit.pipeline.vae, DDPMScheduler())
    refused(lambda: apply_cache_on_pipeline(pipeline, "Fast", calibration=str(saved)), "DDIMScheduler", "DDPMScheduler")
    # A transformer alone has none to compare.
    apply_cache_on_transformer(dit.transformer, "Fast", calibration=str(saved), num_steps=STEPS).remove()


@pytest.mark.parametrize("value", [5, 0.5, True, ""])
def test_what_is_no_path_is_refused(dit: Toy, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="calibration"):
        apply_cache_on_pipeline(dit.pipeline, "Fast", calibration=value)
    assert "forward" not in vars(dit.transformer)


def test_another_number_of_steps_is_refused(dit: Toy, saved: Path) -> None:
    settings = {"use_cache": "Fast", "calibration": str(saved)}
    refused(lambda: apply_cache_on_pipeline(dit.pipeline, **settings, num_steps=9), "8 steps", "9")
    with attached(dit.pipeline, "pipeline", **settings) as engine:
        refused(lambda: dit.images(9), "8 steps", "9")
        # It is the generation that is refused, not the ones after it.
        dit.images(STEPS)
        refused(lambda: dit.images(7), "8 steps", "7")
        assert engine.summary()["steps"] == STEPS


def test_an_unknown_number_of_steps_is_refused_before_anything_is_changed(dit: Toy, saved: Path) -> None:
    for calibration in (str(saved), "first"):
        refused(
            lambda given=calibration: apply_cache_on_transformer(dit.transformer, "Fast", calibration=given),
            "num_steps",
        )
    assert "forward" not in vars(dit.transformer)


def test_another_number_of_steps_is_refused_as_often_as_it_is_asked(dit: Toy, saved: Path) -> None:
    with attached(dit.pipeline, "pipeline", "Fast", calibration=str(saved)):
        for _ in range(2):
            refused(lambda: dit.images(STEPS + 1), "steps", "calibrat")
