"""tiny-wan: its clips are composed by rule, its script makes a whole pipeline, the shipped one obeys its prompt."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from training_scripts import import_scripts

from benchmark.common import captions_of
from evaluation.metrics.tracking import ObjectTracker
from xfuser.model_executor.adapters.family import shipped
from xfuser.model_executor.adapters.wan import TINY
from xfuser.model_executor.pipelines import load_pipeline
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.geometry import geometry_of

NAMES = ("train_tiny_wan", "tiny_wan_clips", "tiny_wan_parts", "tiny_wan_judging", "tiny_flux_parts")
STEPS = ("--autoencoder_steps=1", "--decoder_steps=1", "--transformer_steps=2")
LARGEST = 10e6  # bytes
SHIPPED = pytest.mark.skipif(not shipped("tiny-wan").is_dir(), reason="tiny-wan's weights are not in this checkout")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    return import_scripts(*NAMES)


def make(scripts: dict[str, ModuleType], folder: Path, *arguments: str) -> None:
    """Run the script on the folder's data, with everything that it writes in there."""
    paths = {"--data": "emoji.npz", "--parts": "tiny-flux", "--output": "tiny-wan", "--workdir": "work"}
    paths |= {"--grid": "grid.png", "--animation": "moving.webp"}
    named = [each for flag, name in paths.items() for each in (flag, str(folder / name))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *named, "--threads", "1", "--batch_size=2", "--clips=4", *arguments])
        scripts["train_tiny_wan"].main()


@pytest.fixture(scope="module")
def folder(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured squares for the 32 objects, a tiny-flux's text encoder of random weights, and the tiny-wan of both."""
    folder = tmp_path_factory.mktemp("tiny-wan")
    objects = scripts["tiny_wan_clips"].OBJECTS
    images = np.full((len(objects), 64, 64, 3), 255, np.uint8)
    images[:, 8:56, 8:56] = np.random.default_rng(0).integers(0, 230, (len(objects), 1, 1, 3))
    np.savez(folder / "emoji.npz", images=images, captions=objects, styles=["twemoji"] * len(objects))
    parts, clips = scripts["tiny_flux_parts"], scripts["tiny_wan_clips"]
    tokenizer = parts.train_tokenizer([clips.caption_of(pair) for pair in clips.split_pairs()[0]], clip=False)
    torch.manual_seed(0)
    parts.build_t5(tokenizer).save_pretrained(folder / "tiny-flux" / "text_encoder_2")
    tokenizer.save_pretrained(folder / "tiny-flux" / "tokenizer_2")
    (folder / "tiny-flux" / "model_index.json").write_text("{}")
    make(scripts, folder, *STEPS, "--judged=1", "--judged_steps=1")
    return folder


def test_held_out_pairs_share_their_objects_and_directions_with_others(scripts: dict[str, ModuleType]) -> None:
    trained, held_out = scripts["tiny_wan_clips"].split_pairs()
    assert len(trained) == 112 and len(held_out) == 16 and not set(trained) & set(held_out)
    assert len({thing for thing, _ in held_out}) == 16
    assert sorted(direction for _, direction in held_out) == sorted(["down", "left", "right", "up"] * 4)
    assert {thing for thing, _ in held_out} <= {thing for thing, _ in trained}


def test_clips_show_what_their_captions_say(scripts: dict[str, ModuleType], folder: Path) -> None:
    clips = scripts["tiny_wan_clips"]
    sprites = clips.load_sprites(folder / "emoji.npz")
    tracker = ObjectTracker(sprites.names, sprites.through, sprites.own)
    generator = torch.Generator().manual_seed(3)
    for pair in [("red apple", "left"), ("taxi", "right"), ("rocket", "up"), ("crab", "down")]:
        clip = clips.draw_clip(sprites, pair, generator)
        assert clip.shape == (3, 13, 64, 64) and clip.min() >= 0 and clip.max() <= 1
        found = tracker.track(clip.permute(1, 2, 3, 0))
        assert (found.name, found.direction) == pair
        assert max(map(abs, found.velocity)) == pytest.approx(clips.SPEED, abs=1e-4)
        assert clips.caption_of(pair) == " moving ".join(pair)


def test_objects_lie_over_the_ground_without_a_white_rim(scripts: dict[str, ModuleType]) -> None:
    image = torch.ones(1, 3, 64, 64)
    image[..., 16:48, 16:48] = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    image[..., 28:36, 28:36] = 1  # white inside of the object belongs to it
    through, own = scripts["tiny_wan_clips"].cut_out(image, 32)
    over_black = own[0]
    assert torch.allclose(over_black[:, 15:17, 15:17], torch.ones(3, 2, 2), atol=0.05)
    assert over_black[:, :7].max() < 0.05 and over_black[1:, 8:11].max() < 0.2
    assert through[..., :7, :].min() > 0.95 and through[..., 12:20, 12:20].max() < 0.05


def test_missing_objects_are_named(scripts: dict[str, ModuleType], folder: Path) -> None:
    with pytest.raises(ValueError, match="lacks unicorn in the style twemoji"):
        scripts["tiny_wan_clips"].load_sprites(folder / "emoji.npz", ("crab", "unicorn"))


def test_the_script_makes_a_small_pipeline_with_the_text_encoder_of_another(folder: Path) -> None:
    model = folder / "tiny-wan"
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) <= LARGEST
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert not any((model / part).exists() for part in ("text_encoder", "tokenizer"))
    judged = json.loads((model / "evaluation" / "tracked.json").read_text())
    assert judged["composed"]["both"] == 1 and judged["held_out_pairs"]["clips"] == 1
    assert (folder / "grid.png").stat().st_size > 0
    with Image.open(folder / "moving.webp") as moving:
        assert moving.n_frames > 1  # equal ones are written once
    assert "CC-BY 4.0" in (model / "README.md").read_text()
    assert "red apple moving right" in ObjectTracker.load(model / "evaluation" / "objects.safetensors").captions


def test_its_folder_is_known_for_what_it_is(folder: Path) -> None:
    args = argparse.Namespace(model=str(folder / "tiny-wan"), model_type="wan")
    resolve_model(args)
    assert args.model_type == "tiny-wan"
    assert geometry_of("tiny-wan", args.model).tokens == 64
    loaded = load_pipeline("tiny-wan", args.model)
    assert all(loaded.denoiser.config[name] in (value, tuple(np.atleast_1d(value))) for name, value in TINY.items())
    clips = loaded.generate(["red apple moving left", "crab moving up"], [0, 1], num_inference_steps=2)
    assert clips.shape == (2, 13, 64, 64, 3) and np.isfinite(clips).all()
    alone = loaded.generate(["crab moving up"], [1], num_inference_steps=2)
    assert np.allclose(alone[0], clips[1], atol=1e-4)


def test_the_text_is_read_as_in_training(folder: Path, scripts: dict[str, ModuleType]) -> None:
    pipeline = load_pipeline("tiny-wan", str(folder / "tiny-wan")).pipeline
    phrases = ["red apple moving left", "crab moving up"]
    states, empty = pipeline.encode_prompt(phrases, max_sequence_length=16)
    text = scripts["tiny_wan_parts"].Text(pipeline.text_encoder, pipeline.tokenizer)
    assert torch.allclose(text.encode([*phrases, ""]), torch.cat([states, empty[:1]]), atol=1e-5)
    assert not torch.allclose(states[0], states[1], atol=1e-2)


def test_training_computes_what_the_pipeline_does(scripts: dict[str, ModuleType]) -> None:
    parts = scripts["tiny_wan_parts"]
    torch.manual_seed(0)
    transformer, vae = parts.build_transformer(24), parts.build_autoencoder()
    torch.nn.init.normal_(transformer.proj_out.weight)
    torch.nn.init.normal_(transformer.condition_embedder.time_proj.weight, std=0.1)
    inputs = (torch.randn(2, 32, 4, 4, 4), torch.tensor([200.0, 900.0]), torch.randn(2, 16, 24))
    with torch.no_grad():
        fused = transformer(*inputs).sample
        transformer.set_attn_processor(parts.EagerAttention())
        assert torch.allclose(transformer(*inputs).sample, fused, atol=1e-4)
        latents = torch.randn(1, 32, 3, 2, 2)
        decoded = parts.decode_unclamped(vae, latents)
        assert decoded.shape == (1, 3, 9, 32, 32)
        assert torch.equal(decoded.clamp(-1, 1), vae.decode(latents).sample)


def test_the_trainings_go_on_from_their_checkpoints(folder: Path, scripts: dict[str, ModuleType]) -> None:
    def step() -> str:
        with safe_open(folder / "work" / "transformer.safetensors", framework="pt") as opened:
            return opened.metadata()["step"]

    assert step() == "2"
    latents = (folder / "work" / "clips.safetensors").stat().st_mtime_ns
    make(scripts, folder, "--stages", "transformer", "--transformer_steps=3")
    assert step() == "3"
    assert (folder / "work" / "clips.safetensors").stat().st_mtime_ns == latents


def test_what_is_missing_is_said_at_once(
    scripts: dict[str, ModuleType], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make(scripts, folder, "--parts", "NOWHERE")
    assert "expected a tiny-flux" in capsys.readouterr().err.splitlines()[-1]


@SHIPPED
def test_the_shipped_model_moves_what_it_is_told() -> None:
    judged = json.loads((shipped("tiny-wan") / "evaluation" / "tracked.json").read_text())
    assert judged["composed"]["both"] > 0.95 and judged["held_out_pairs"]["both"] >= 0.8
    assert set(captions_of("tiny-wan")) >= {"red apple moving right", "rocket moving up"}
    tracker = ObjectTracker.load(shipped("tiny-wan") / "evaluation" / "objects.safetensors")
    asked = [("taxi", "right"), ("rocket", "up"), ("blue heart", "left"), ("crab", "down")]
    prompts = [" moving ".join(each) for each in asked]
    clips = torch.from_numpy(load_pipeline("tiny-wan").generate(prompts, [0, 1, 2, 3], num_inference_steps=25))
    tracks = [tracker.track(clip) for clip in clips]
    assert sum((each.name, each.direction) == pair for each, pair in zip(tracks, asked, strict=True)) >= 3
