"""tiny-sd: its script makes a whole pipeline with parts of a tiny-flux; the shipped one draws what it is asked for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from training_scripts import import_scripts, run, train, write_emoji_and_flux

from evaluation.metrics.matcher import ImageTextMatcher
from xfuser.model_executor.adapters.family import shipped
from xfuser.model_executor.adapters.unet import TINY
from xfuser.model_executor.pipelines import load_pipeline
from xfuser.model_executor.pipelines.choosing import resolve_model

LARGEST = 14e6  # bytes
SHIPPED = pytest.mark.skipif(not shipped("tiny-sd").is_dir(), reason="tiny-sd's weights are not in this checkout")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    return import_scripts("train_tiny_sd", "train_tiny_flux")


@pytest.fixture(scope="module")
def folder(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny-flux of random weights, and the tiny-sd that the script makes with it."""
    folder = tmp_path_factory.mktemp("tiny-sd")
    write_emoji_and_flux(folder)
    make(scripts, folder, "--coarse_steps=1", "--unet_steps=2", "--judged=1", "--judged_steps=1")
    return folder


def make(scripts: dict[str, ModuleType], folder: Path, *arguments: str) -> None:
    train(scripts["train_tiny_sd"], folder, "tiny-sd", *arguments)


def test_the_script_makes_a_small_pipeline_with_the_parts_of_another(folder: Path) -> None:
    model = folder / "tiny-sd"
    files = [path for path in model.rglob("*") if path.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in files) <= LARGEST
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["vae"] == ["diffusers", "AutoencoderKL"]
    assert not any((model / part).exists() for part in ("vae", "text_encoder", "tokenizer"))
    assert json.loads((model / "evaluation" / "matched.json").read_text())["images"] == 1
    assert (folder / "grid.png").stat().st_size > 0
    assert "CC-BY 4.0" in (model / "README.md").read_text()


def test_its_unet_has_transformer_blocks_at_two_widths_and_foretells_noise(folder: Path) -> None:
    pipeline = load_pipeline("tiny-sd", str(folder / "tiny-sd")).pipeline
    blocks = [name for name, _ in pipeline.unet.named_modules() if name.endswith("transformer_blocks.0")]
    assert len(blocks) == 7
    widths = {pipeline.unet.get_submodule(name).attn1.to_q.in_features for name in blocks}
    assert widths == set(TINY["block_out_channels"])
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_its_folder_is_known_for_what_it_is(folder: Path) -> None:
    args = argparse.Namespace(model=str(folder / "tiny-sd"), model_type="sd")
    resolve_model(args)
    assert args.model_type == "tiny-sd"
    loaded = load_pipeline("tiny-sd", args.model)
    images = loaded.generate(["red apple", "blue heart, noto"], [0, 1], num_inference_steps=2)
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all()
    alone = loaded.generate(["blue heart, noto"], [1], num_inference_steps=2)
    assert np.allclose(alone[0], images[1], atol=1e-4)


def test_the_text_is_read_as_in_training(folder: Path, scripts: dict[str, ModuleType]) -> None:
    pipeline = load_pipeline("tiny-sd", str(folder / "tiny-sd")).pipeline
    states, empty = pipeline.encode_prompt(["red apple", "blue apple"], "cpu", 1, True)
    assert states.shape == (2, 20, 128)
    assert not torch.allclose(states[0], states[1], atol=1e-2)
    parts = scripts["train_tiny_sd"].Parts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    assert torch.allclose(parts.encode(["red apple", "blue apple", ""]), torch.cat([states, empty[:1]]), atol=1e-5)


def test_the_training_goes_on_from_its_checkpoint(folder: Path, scripts: dict[str, ModuleType]) -> None:
    def step() -> str:
        with safe_open(folder / "work" / "unet.safetensors", framework="pt") as opened:
            return opened.metadata()["step"]

    assert step() == "2"
    latents = (folder / "work" / "latents.safetensors").stat().st_mtime_ns
    make(scripts, folder, "--stages", "unet", "--unet_steps=3")
    assert step() == "3"
    assert (folder / "work" / "latents.safetensors").stat().st_mtime_ns == latents


def test_the_noise_of_a_batch_can_be_learnt(scripts: dict[str, ModuleType], folder: Path, tmp_path: Path) -> None:
    """On one image whose noise and times are given by the seed, the loss falls."""
    script = scripts["train_tiny_sd"]
    scheduler, unet = script.build_scheduler(), script.build_unet()
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)
    times, text = torch.tensor([600, 900]), torch.randn(2, 20, 128, generator=generator)
    noisy = scheduler.add_noise(clean, noise, times)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.mse_loss(unet(noisy, times, text).sample, noise)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_parts_come_from_checkpoints_too(scripts: dict[str, ModuleType], folder: Path, tmp_path: Path) -> None:
    flux = ["--workdir", str(tmp_path / "flux"), "--stages", "autoencoder", "text", "--batch_size=2"]
    run(scripts["train_tiny_flux"], folder, *flux, "--autoencoder_steps=1", "--text_steps=1")
    sd = ["--parts", str(tmp_path / "flux"), "--workdir", str(tmp_path), "--output", str(tmp_path / "model")]
    run(scripts["train_tiny_sd"], folder, *sd, "--stages", "unet", "export", "--unet_steps=1", "--batch_size=2")
    assert not (tmp_path / "model" / "shared.json").exists()
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    images = load_pipeline("tiny-sd", str(tmp_path / "model")).generate(["red apple"], [0], num_inference_steps=1)
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "NOWHERE"], "name one"),
        (["--start", "NOWHERE"], "expected a pipeline's folder"),
        (["--matcher", "NOWHERE"], "leave judge out of --stages"),
    ],
)
def test_what_is_missing_is_said_at_once(
    arguments: list[str], said: str, scripts: dict[str, ModuleType], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(scripts["train_tiny_sd"], folder, "--parts", str(folder / "tiny-flux"), *arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]


@SHIPPED
def test_the_shipped_model_draws_what_it_is_asked_for() -> None:
    matched = json.loads((shipped("tiny-sd") / "evaluation" / "matched.json").read_text())
    assert matched["generated"] >= 0.6 * matched["real"]
    prompts = ["red apple", "blue heart", "cat face", "banana"]
    images = load_pipeline("tiny-sd").generate(prompts, [0, 1, 2, 3], num_inference_steps=12)
    matcher = ImageTextMatcher.load(shipped("tiny-flux") / "evaluation" / "matcher.safetensors")
    assert (matcher.ranks(torch.from_numpy(images).permute(0, 3, 1, 2), prompts) < 10).sum() >= 3
