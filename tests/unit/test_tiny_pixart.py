"""tiny-pixart: its script makes a whole pipeline with parts of a tiny-flux; the shipped one draws what it is asked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_scripts import import_scripts, run, train, write_emoji_and_flux

from evaluation.metrics.matcher import ImageTextMatcher
from xfuser.model_executor.adapters.family import shipped
from xfuser.model_executor.adapters.pixart import TINY
from xfuser.model_executor.pipelines import load_pipeline
from xfuser.model_executor.pipelines.choosing import resolve_model

LARGEST = 6e6  # bytes
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHIPPED = pytest.mark.skipif(
    not shipped("tiny-pixart").is_dir(), reason="tiny-pixart's weights are not in this checkout"
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return import_scripts("train_tiny_pixart")["train_tiny_pixart"]


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny-flux of random weights, and the tiny-pixart that the script makes with it."""
    folder = tmp_path_factory.mktemp("tiny-pixart")
    write_emoji_and_flux(folder)
    steps = ("--coarse_steps=1", "--transformer_steps=2", "--judged=1", "--judged_steps=1")
    train(script, folder, "tiny-pixart", *steps)
    return folder


def test_the_script_makes_a_small_pipeline_with_the_parts_of_another(folder: Path) -> None:
    model = folder / "tiny-pixart"
    assert 1e6 < sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= LARGEST
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline" and index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert not any((model / part).exists() for part in ("vae", "text_encoder", "tokenizer"))
    assert json.loads((model / "evaluation" / "matched.json").read_text())["images"] == 1
    assert "CC-BY 4.0" in (model / "README.md").read_text()


def test_its_folder_is_known_for_what_it_is(folder: Path) -> None:
    args = argparse.Namespace(model=str(folder / "tiny-pixart"), model_type="pixart")
    resolve_model(args)
    assert args.model_type == "tiny-pixart"
    loaded = load_pipeline("tiny-pixart", args.model)
    assert all(loaded.denoiser.config[name] == value for name, value in TINY.items())
    images = loaded.generate(["red apple", "blue heart, noto"], [0, 1], num_inference_steps=2)
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all()
    alone = loaded.generate(["blue heart, noto"], [1], num_inference_steps=2)
    assert np.allclose(alone[0], images[1], atol=1e-4)


def test_the_text_is_read_as_in_training(folder: Path, script: ModuleType) -> None:
    """States beyond a text's end are masked, however many the pipeline adds."""
    pipeline = load_pipeline("tiny-pixart", str(folder / "tiny-pixart")).pipeline
    states, mask, empty, nothing = pipeline.encode_prompt(
        ["red apple", "blue apple"], device="cpu", clean_caption=False, max_sequence_length=24
    )
    parts = script.Parts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    told, kept = parts.encode(["red apple", "blue apple", ""])
    wanted = torch.cat([states, empty[:1]])
    for ours, theirs, own, other in zip(told, wanted, kept, torch.cat([mask, nothing[:1]]), strict=True):
        assert torch.allclose(ours[own.bool()], theirs[other.bool()], atol=1e-5)
    assert not torch.allclose(states[0], states[1], atol=1e-2)


def test_its_blocks_begin_as_the_identity(script: ModuleType) -> None:
    transformer = script.build_transformer()
    hidden_states, text = torch.randn(2, 64, 112), torch.randn(2, 16, 112)
    modulation = torch.zeros(2, 6 * 112)
    for block in transformer.transformer_blocks:
        after = block(hidden_states, encoder_hidden_states=text, timestep=modulation)
        assert torch.equal(after, hidden_states)


def test_the_training_goes_on_from_checkpoints_and_from_a_pipeline(
    folder: Path, script: ModuleType, tmp_path: Path
) -> None:
    def step(workdir: Path) -> str:
        with safe_open(workdir / "transformer.safetensors", framework="pt") as opened:
            return opened.metadata()["step"]

    assert step(folder / "work") == "2"
    train(script, folder, "tiny-pixart", "--stages", "transformer", "--transformer_steps=3")
    assert step(folder / "work") == "3"
    named = ["--parts", str(folder / "tiny-flux"), "--start", str(folder / "tiny-pixart"), "--batch_size=2"]
    named += ["--workdir", str(tmp_path), "--output", str(tmp_path / "model"), "--stages", "export"]
    run(script, folder, *named)
    ours, theirs = (load_file(each / "transformer" / WEIGHTS) for each in (tmp_path / "model", folder / "tiny-pixart"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "NOWHERE"], "name one"),
        (["--start", "NOWHERE"], "expected a pipeline's folder"),
        (["--matcher", "NOWHERE"], "leave judge out of --stages"),
    ],
)
def test_what_is_missing_is_said_at_once(
    arguments: list[str], said: str, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(script, folder, "--parts", str(folder / "tiny-flux"), *arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]


@SHIPPED
def test_the_shipped_model_draws_what_it_is_asked_for() -> None:
    prompts = ["red apple", "germany flag", "smiling face with sunglasses", "blue heart"]
    images = load_pipeline("tiny-pixart").generate(prompts, [0, 1, 2, 3], num_inference_steps=12)
    matcher = ImageTextMatcher.load(shipped("tiny-flux") / "evaluation" / "matcher.safetensors")
    assert (matcher.ranks(torch.from_numpy(images).permute(0, 3, 1, 2), prompts) < 50).sum() >= 3
