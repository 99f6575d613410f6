"""tiny-flux: what its script makes is a whole pipeline; what is shipped, where it is, draws what it is asked for."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from evaluation.metrics.matcher import ImageTextMatcher
from xfuser.model_executor.pipelines import MODEL_TYPES, load_pipeline
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.model_types import shipped_tiny_flux

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LARGEST = 14e6  # bytes
SHIPPED = pytest.mark.skipif(not shipped_tiny_flux().is_dir(), reason="tiny-flux's weights are not in this checkout")


def train(script: ModuleType, folder: Path, data: Path, *arguments: str) -> None:
    named = ["train", "--data", str(data), "--output", str(folder / "model"), "--workdir", str(folder / "work")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*named, "--grid", str(folder / "grid.png"), "--threads", "1", *arguments])
        script.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the script, given 8 captions in two styles, has run each of its stages for a step or two."""
    folder = tmp_path_factory.mktemp("tiny-flux")
    generator = np.random.default_rng(0)
    captions = np.array([f"{colour} {thing}" for colour in ("red", "blue") for thing in "apple heart cat key".split()])
    np.savez(
        folder / "emoji.npz",
        images=generator.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8),
        captions=np.tile(captions, 2),
        styles=np.repeat(["noto", "twemoji"], 8),
    )
    steps = [f"--{stage}_steps=1" for stage in ("autoencoder", "text", "coarse", "transformer", "guide")]
    sys.path.insert(0, str(SCRIPTS))
    try:
        script = importlib.import_module("train_tiny_flux")
        arguments = [*steps, "--batch_size=2", "--judged=1", "--judged_steps=1"]
        train(script, folder, folder / "emoji.npz", *arguments)
        train(script, folder, folder / "emoji.npz", "--stages", "coarse", "--coarse_steps=2", "--batch_size=2")
    finally:
        sys.path.remove(str(SCRIPTS))
    return folder


def test_the_script_makes_a_whole_pipeline(folder: Path) -> None:
    model = folder / "model"
    files = [path for path in model.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert json.loads((model / "evaluation" / "matched.json").read_text())["images"] == 1
    assert (folder / "grid.png").stat().st_size > 0


def test_its_folder_is_known_for_what_it_is(folder: Path) -> None:
    args = argparse.Namespace(model=str(folder / "model"), model_type="flux")
    resolve_model(args)
    assert args.model_type == "tiny-flux"
    loaded = load_pipeline("tiny-flux", args.model)
    images = loaded.generate(["red apple", "blue heart, noto"], [0, 1], num_inference_steps=2)
    assert images.shape == (2, 64, 64, 3)
    assert np.isfinite(images).all()
    alone = loaded.generate(["blue heart, noto"], [1], num_inference_steps=2)
    assert np.allclose(alone[0], images[1], atol=1e-4)


def test_the_text_is_read(folder: Path) -> None:
    pipeline = load_pipeline("tiny-flux", str(folder / "model")).pipeline
    states, pooled, _ = pipeline.encode_prompt(["red apple", "Red  Apple", "blue apple"], None, max_sequence_length=16)
    for each in (states, pooled):
        assert torch.allclose(each[0], each[1], atol=1e-5)
        assert not torch.allclose(each[0], each[2], atol=1e-2)
    assert states.shape == (3, 16, 96) and pooled.shape == (3, 128)


def test_a_stage_goes_on_from_its_checkpoint(folder: Path) -> None:
    from safetensors import safe_open

    steps = {}
    for stage in ("coarse", "transformer"):
        with safe_open(folder / "work" / f"{stage}.safetensors", framework="pt") as opened:
            steps[stage] = opened.metadata()["step"]
    assert steps == {"coarse": "2", "transformer": "1"}


def test_held_out_images_are_one_style_of_a_caption(folder: Path) -> None:
    emoji = importlib.import_module("tiny_flux_parts").load_emoji(folder / "emoji.npz", share_held_out=0.5)
    held_out = {emoji.captions[index] for index in emoji.held_out.nonzero()[:, 0].tolist()}
    assert len(held_out) == int(emoji.held_out.sum()) == 4
    assert {emoji.captions[index] for index in emoji.trained_on.tolist()} == set(emoji.captions)


def test_where_it_does_not_come_along_the_script_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = dataclasses.replace(MODEL_TYPES["tiny-flux"], default=lambda: tmp_path / "none")
    monkeypatch.setitem(MODEL_TYPES, "tiny-flux", absent)
    with pytest.raises(ValueError, match=r"not in this installation; train it with scripts/train_tiny_flux\.py"):
        load_pipeline("tiny-flux")


@SHIPPED
def test_the_shipped_folder_is_small_and_says_what_it_was_trained_on() -> None:
    files = [path for path in shipped_tiny_flux().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    credits = (shipped_tiny_flux() / "README.md").read_text()
    assert "Apache-2.0" in credits and "CC-BY 4.0" in credits


@SHIPPED
def test_the_shipped_model_draws_what_it_is_asked_for() -> None:
    matched = json.loads((shipped_tiny_flux() / "evaluation" / "matched.json").read_text())
    assert matched["real"] >= 0.85
    assert matched["generated"] >= 0.7 * matched["real"]
    prompts = ["red apple", "blue heart", "cat face", "banana"]
    images = load_pipeline("tiny-flux").generate(prompts, [0, 1, 2, 3], num_inference_steps=12)
    matcher = ImageTextMatcher.load(shipped_tiny_flux() / "evaluation" / "matcher.safetensors")
    assert (matcher.ranks(torch.from_numpy(images).permute(0, 3, 1, 2), prompts) < 10).sum() >= 3
