"""tiny-dit-l: its script takes tiny-dit's autoencoder and classifier; the shipped one draws what it is asked for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file
from training_scripts import import_scripts

from benchmark.common import evaluation_folder
from evaluation.metrics import FeatureNetwork
from xfuser.model_executor.adapters.dit import TINY_DEEP
from xfuser.model_executor.adapters.family import shipped
from xfuser.model_executor.pipelines import MODEL_TYPES, load_pipeline
from xfuser.model_executor.pipelines.choosing import resolve_model

TINY = shipped("tiny-dit")
LARGEST = 10e6  # bytes
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHIPPED = pytest.mark.skipif(not shipped("tiny-dit-l").is_dir(), reason="tiny-dit-l's weights are not in this checkout")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return import_scripts("train_tiny_dit")["train_tiny_dit"]


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny-dit, images whose labels the classifier reads in them, and the tiny-dit-l that the script makes."""
    folder = tmp_path_factory.mktemp("tiny-dit-l")
    for part in ("vae", "evaluation"):
        shutil.copytree(TINY / part, folder / "tiny-dit" / part)
    shutil.copy(TINY / "model_index.json", folder / "tiny-dit")
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    judge = FeatureNetwork.load(TINY / "evaluation" / "classifier.safetensors")
    vae = AutoencoderKL.from_pretrained(TINY / "vae").float()
    padded = torch.nn.functional.pad(torch.from_numpy(images)[:, None], (2, 2, 2, 2))
    labels = script.recognise(judge, vae, script.encode_images(vae, padded)).numpy()
    np.savez(folder / "mnist.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    train(script, folder, "--transformer_steps=2", "--judged=20")
    return folder


def train(script: ModuleType, folder: Path, *arguments: str) -> None:
    named = ["--data", str(folder / "mnist.npz"), "--model", "tiny-dit-l", "--parts", str(folder / "tiny-dit")]
    named += ["--output", str(folder / "tiny-dit-l"), "--workdir", str(folder / "work"), "--threads=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *named, "--batch_size=2", "--grid", str(folder / "grid.png"), *arguments])
        script.main()


def test_the_script_makes_a_small_pipeline_with_the_parts_of_tiny_dit(folder: Path) -> None:
    model = folder / "tiny-dit-l"
    assert 5e6 < sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= LARGEST
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline" and len(index["id2label"]) == 10
    assert not (model / "vae").exists() and not (model / "evaluation").exists()
    assert "Zalando" in (model / "README.md").read_text() and (folder / "grid.png").is_file()


def test_its_folder_is_known_for_what_it_is(folder: Path) -> None:
    args = argparse.Namespace(model=str(folder / "tiny-dit-l"), model_type=None)
    resolve_model(args)
    assert args.model_type == "tiny-dit-l"
    loaded = load_pipeline("tiny-dit-l", args.model)
    assert all(loaded.denoiser.config[name] == value for name, value in TINY_DEEP.configuration.items())
    images = loaded.generate([0, 1], [0, 1], num_inference_steps=2)
    assert images.shape == (2, 32, 32, 1) and np.isfinite(images).all()


def test_the_training_goes_on_from_checkpoints_and_from_a_pipeline(folder: Path, script: ModuleType) -> None:
    def step(workdir: Path) -> str:
        with safe_open(workdir / "transformer.safetensors", framework="pt") as opened:
            return opened.metadata()["step"]

    assert step(folder / "work") == "2"
    train(script, folder, "--until=transformer", "--transformer_steps=3")
    assert step(folder / "work") == "3"
    named = ["--workdir", str(folder / "other"), "--output", str(folder / "copy"), "--until=export"]
    train(script, folder, *named, "--start", str(folder / "tiny-dit-l"), "--transformer_steps=0")
    ours, theirs = (load_file(folder / model / "transformer" / WEIGHTS) for model in ("copy", "tiny-dit-l"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "NOWHERE"], "expected a tiny-dit"),
        (["--start", "NOWHERE"], "expected a pipeline's folder"),
        (["--model", "tiny-dit"], "tiny-dit has all parts of its own"),
    ],
)
def test_what_is_missing_is_said_at_once(
    arguments: list[str], said: str, script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(script, folder, *arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_where_it_is_not_installed_its_script_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = dataclasses.replace(MODEL_TYPES["tiny-dit-l"], default=lambda: tmp_path)
    monkeypatch.setitem(MODEL_TYPES, "tiny-dit-l", absent)
    with pytest.raises(ValueError, match="train it with scripts/train_tiny_dit.py --model tiny-dit-l, and"):
        load_pipeline("tiny-dit-l")


@SHIPPED
def test_the_shipped_model_draws_the_class_it_is_asked_for() -> None:
    loaded = load_pipeline("tiny-dit-l")
    folder = evaluation_folder(loaded, argparse.Namespace(model=None, evaluation=None))
    assert folder == TINY / "evaluation"
    labels = [index % 10 for index in range(20)]
    images = loaded.generate(labels, list(range(20)), num_inference_steps=20)
    seen = FeatureNetwork.load(folder / "classifier.safetensors").classify(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (seen.argmax(1) == torch.tensor(labels)).double().mean() >= 0.8
