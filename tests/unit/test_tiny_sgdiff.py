"""tiny-sgdiff: its script makes a whole pipeline of scenes that it composes; the shipped one draws what graphs say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from training_scripts import import_scripts

from evaluation.metrics.relations import RelationChecker, Sprites, share_right
from xfuser.model_executor.adapters.family import shipped
from xfuser.model_executor.pipelines import load_pipeline
from xfuser.model_executor.pipelines.shipped import shipped_trajectory

LARGEST, LARGEST_WITH_CALIBRATION = 10e6, 10.5e6  # bytes
SHIPPED = pytest.mark.skipif(
    not shipped("tiny-sgdiff").is_dir(), reason="tiny-sgdiff's weights are not in this checkout"
)
STEPS = ("--autoencoder_steps=1", "--encoder_steps=1", "--unet_steps=2", "--decoder_steps=1")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    return import_scripts("train_tiny_sgdiff", "tiny_sgdiff_parts", "tiny_flux_parts", "tiny_scenes")


@pytest.fixture(scope="module")
def folder(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of every object, an autoencoder of random weights, and the tiny-sgdiff that the script makes with it."""
    folder = tmp_path_factory.mktemp("tiny-sgdiff")
    names = scripts["tiny_scenes"].OBJECTS
    images = np.full((len(names), 64, 64, 3), 255, np.uint8)
    images[:, 8:56, 12:52] = np.random.default_rng(0).integers(0, 200, (len(names), 48, 40, 3), dtype=np.uint8)
    np.savez(folder / "emoji.npz", images=images, captions=np.array(names), styles=np.array(["noto"] * len(names)))
    torch.manual_seed(0)
    scripts["tiny_flux_parts"].build_autoencoder().save_pretrained(folder / "tiny-flux" / "vae")
    make(scripts, folder, *STEPS, "--judged=16", "--judged_steps=1")
    return folder


def make(scripts: dict[str, ModuleType], folder: Path, *arguments: str) -> None:
    named = ["train", "--data", str(folder / "emoji.npz"), "--parts", str(folder / "tiny-flux"), "--threads", "1"]
    named += ["--grid", str(folder / "grid.png"), "--workdir", str(folder / "work"), "--scenes", "8", "--batch_size=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*named, "--output", str(folder / "model"), *arguments])
        scripts["train_tiny_sgdiff"].main()


def test_the_script_makes_a_small_pipeline(folder: Path) -> None:
    model = folder / "model"
    assert 1e6 < sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= LARGEST
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "SceneGraphPipeline"
    assert index["graph_encoder"] == ["xfuser.model_executor.pipelines.scene_graph_encoder", "SceneGraphEncoder"]
    record = json.loads((model / "evaluation" / "relations.json").read_text())
    assert record["graphs"] == 16 and record["composed"] > record["generated"]
    assert (folder / "grid.png").stat().st_size > 0
    assert not any(str(folder) in path.read_text() for path in model.rglob("*.json"))
    assert "CC-BY 4.0" in (model / "README.md").read_text()


def test_its_graphs_are_held_out_and_can_be_drawn(folder: Path, scripts: dict[str, ModuleType]) -> None:
    graphs = json.loads((folder / "model" / "evaluation" / "scene_graphs.json").read_text())
    is_held_out = scripts["tiny_scenes"].is_held_out
    for graph in graphs:
        names = graph["objects"]
        assert any(is_held_out(names[s], p, names[o]) for s, p, o in graph["relations"])
    images = load_pipeline("tiny-sgdiff", str(folder / "model")).generate(graphs[:2], [0, 1], num_inference_steps=1)
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all()


def test_what_trained_encodes_as_what_was_exported(folder: Path, scripts: dict[str, ModuleType]) -> None:
    pipeline = load_pipeline("tiny-sgdiff", str(folder / "model")).pipeline
    latents = pipeline.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    assert latents.shape == (1, 4, 16, 16)
    saved = AutoencoderKL.from_pretrained(folder / "tiny-flux" / "vae")
    assert not torch.allclose(saved.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode(), latents, atol=1e-2)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_trainings_go_on_from_their_checkpoints(folder: Path, scripts: dict[str, ModuleType]) -> None:
    def step(stage: str) -> str:
        with safe_open(folder / "work" / f"{stage}.safetensors", framework="pt") as opened:
            return opened.metadata()["step"]

    stages = ("autoencoder", "encoder", "unet", "decoder")
    assert [step(stage) for stage in stages] == ["1", "1", "2", "1"]
    made = [(folder / "work" / f"{name}.safetensors").stat().st_mtime_ns for name in ("scenes", "latents")]
    make(scripts, folder, "--stages", "unet", "--unet_steps=3")
    assert [step(stage) for stage in stages] == ["1", "1", "3", "1"]
    assert made == [(folder / "work" / f"{name}.safetensors").stat().st_mtime_ns for name in ("scenes", "latents")]


@pytest.mark.parametrize("along", [True, False])
def test_a_pipeline_is_trained_on_with_its_encoder_or_without(
    folder: Path, scripts: dict[str, ModuleType], tmp_path: Path, along: bool
) -> None:
    arguments = ["--start", str(folder / "model"), "--workdir", str(tmp_path), "--output", str(tmp_path / "model")]
    arguments += ["--train_encoder"] if along else []
    make(scripts, folder, *arguments, "--stages", "unet", "export", "--unet_steps=1")
    before, after = (
        load_pipeline("tiny-sgdiff", str(each)).pipeline for each in (folder / "model", tmp_path / "model")
    )

    def changed(part: str) -> bool:
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        return any(not torch.equal(*pair) for pair in pairs)

    assert changed("unet") and changed("graph_encoder") == along
    assert not (tmp_path / "autoencoder.safetensors").exists()


def test_the_decoder_learns_without_moving_the_latents(
    folder: Path, scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    arguments = ["--start", str(folder / "model"), "--workdir", str(tmp_path), "--output", str(tmp_path / "model")]
    make(scripts, folder, *arguments, "--stages", "decoder", "export", "--decoder_steps=2")
    vaes = [load_pipeline("tiny-sgdiff", str(each)).pipeline.vae for each in (folder / "model", tmp_path / "model")]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before, after = (vae.encode(image).latent_dist.mode() for vae in vaes)
    # The latents are made standard anew, from the same scenes.
    assert torch.allclose(before, after, atol=0.02)
    assert not torch.equal(*(vae.decode(before).sample for vae in vaes))


def test_the_pretraining_can_be_learnt(scripts: dict[str, ModuleType]) -> None:
    """On one batch, both losses fall."""
    parts = scripts["tiny_sgdiff_parts"]
    torch.manual_seed(0)
    pretraining = parts.Pretraining(parts.build_encoder())
    graphs = [
        {"objects": [name, "package"], "relations": [[0, predicate, 1]]}
        for name in ("banana", "grapes")
        for predicate in ("left of", "above")
    ]
    numbers = pretraining.encoder.numbers_of(graphs)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(pretraining.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        both = pretraining.losses(latents, numbers, torch.Generator().manual_seed(1))
        losses.append(both.tolist())
        optimizer.zero_grad()
        both.sum().backward()
        optimizer.step()
    assert losses[-1][0] < 0.9 * losses[0][0] and losses[-1][1] < 0.5 * losses[0][1]


@SHIPPED
def test_the_shipped_model_draws_what_graphs_say() -> None:
    model = shipped("tiny-sgdiff")
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= LARGEST_WITH_CALIBRATION
    record = json.loads((model / "evaluation" / "relations.json").read_text())
    assert record["composed"] >= 0.98 and record["generated"] >= 0.6 > 10 * record["generated_of_other_graphs"]
    graphs = json.loads((model / "evaluation" / "scene_graphs.json").read_text())[:12]
    images = load_pipeline("tiny-sgdiff").generate(graphs, list(range(12)), num_inference_steps=20)
    checker = RelationChecker(Sprites.load(model / "evaluation" / "objects.png"))
    assert share_right(checker.check(torch.from_numpy(images).permute(0, 3, 1, 2), graphs)) >= 0.45
    assert shipped_trajectory("tiny-sgdiff", 50) is not None
