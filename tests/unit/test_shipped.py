"""Models that come with the package: found where their folder is, refused where not, and with parts of each other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from xfuser import cli
from xfuser.model_executor.adapters.flux import build_small as build_flux
from xfuser.model_executor.adapters.unet import build_small as build_unet
from xfuser.model_executor.pipelines import MODEL_TYPES, load_pipeline
from xfuser.model_executor.pipelines.geometry import geometry_of
from xfuser.model_executor.pipelines.shipped import SHARED, own_model, shared_parts, shipped_models, shipped_types

PARTS = {"vae": "tiny-flux", "text_encoder": "tiny-flux", "tokenizer": "tiny-flux"}
PROMPTS = ["red apple", "blue heart"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a FLUX, a UNet pipeline with three of FLUX's parts (``whole``), and one that links to them."""
    folder = tmp_path_factory.mktemp("assets")
    flux, unet = build_flux(), build_unet()
    flux.save_pretrained(folder / "tiny-flux")
    unet = StableDiffusionPipeline(
        unet=unet.unet,
        scheduler=unet.scheduler,
        vae=flux.vae,
        text_encoder=flux.text_encoder,
        tokenizer=flux.tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    unet.save_pretrained(folder / "whole")
    linked = shutil.copytree(folder / "whole", folder / "tiny-sd")
    for part in PARTS:
        shutil.rmtree(linked / part)
    (linked / SHARED).write_text(json.dumps(PARTS))
    return folder


@pytest.fixture
def installed(assets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, in the place of the package's own."""
    for name in ("tiny-flux", "tiny-sd"):
        replaced = dataclasses.replace(MODEL_TYPES[name], default=lambda name=name: assets / name)
        monkeypatch.setitem(MODEL_TYPES, name, replaced)
    return assets


# -- which there are ---------------------------------------------------------------------------------------------------


def test_those_that_are_there_are_listed(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = shipped_models()
    assert {name: there[name] for name in ("tiny-flux", "tiny-sd")} == {
        "tiny-flux": installed / "tiny-flux",
        "tiny-sd": installed / "tiny-sd",
    }
    assert (there["tiny-dit"] / "transformer").is_dir()
    absent = dataclasses.replace(MODEL_TYPES["tiny-sd"], default=lambda: installed / "none")
    monkeypatch.setitem(MODEL_TYPES, "tiny-sd", absent)
    assert "tiny-sd" in shipped_types() and "tiny-sd" not in shipped_models()
    assert own_model("flux") is None and own_model("tiny-flux") == installed / "tiny-flux"


def test_one_that_is_not_there_is_refused_in_one_line(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = dataclasses.replace(MODEL_TYPES["tiny-sd"], default=lambda: installed / "none")
    monkeypatch.setitem(MODEL_TYPES, "tiny-sd", absent)
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", "tiny-sd", "--prompt", "red apple"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiny-sd is not in this installation; train it with scripts/train_tiny_sd.py, and name its folder" in line
    assert line.endswith(f"those that are there: {', '.join(shipped_models())}")


def test_the_command_takes_the_models_own_sizes_steps_and_guidance(installed: Path, tmp_path: Path) -> None:
    cli.main(["generate", "--model", "tiny-flux", "--prompt", "red apple", "--output_dir", str(tmp_path)])
    request = json.loads((tmp_path / "statistics.json").read_text())["request"]
    assert Image.open(tmp_path / "image_00000.png").size == (64, 64)
    assert request["num_inference_steps"] == 28
    cli.main(
        ["generate", "--model", "tiny-flux", "--prompt", "red apple", "--output_dir", str(tmp_path), "--overwrite"]
        + ["--num_inference_steps", "2", "--height", "32"]
    )
    request = json.loads((tmp_path / "statistics.json").read_text())["request"]
    assert Image.open(tmp_path / "image_00000.png").size == (64, 32)
    assert request["num_inference_steps"] == 2


def test_the_call_of_tiny_flux() -> None:
    loaded = dataclasses.replace(load_pipeline("flux", "toy"), model_type="tiny-flux", name="tiny-flux")
    arguments = loaded.arguments(["red apple"], [0], 28)
    wanted = {"height": 64, "width": 64, "max_sequence_length": 16, "guidance_scale": 2.0}
    assert {name: arguments[name] for name in wanted} == wanted


# -- parts that models share -------------------------------------------------------------------------------------------


def test_a_model_with_anothers_parts_draws_what_the_whole_one_draws(assets: Path) -> None:
    assert not (assets / "tiny-sd" / "vae").exists()
    images = [load_pipeline("sd", str(assets / name)).generate(PROMPTS, [0, 1], 3) for name in ("whole", "tiny-sd")]
    assert np.array_equal(*images)
    assert images[0].std() > 0


def test_shared_parts_have_the_precision_that_is_asked_for(assets: Path) -> None:
    pipeline = load_pipeline("sd", str(assets / "tiny-sd"), dtype=torch.bfloat16).pipeline
    assert {pipeline.vae.dtype, pipeline.text_encoder.dtype, pipeline.unet.dtype} == {torch.bfloat16}


def test_a_part_may_have_another_name_there(assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets / "tiny-flux", tmp_path / "first")
    second = shutil.copytree(assets / "tiny-flux", tmp_path / "second")
    shutil.rmtree(second / "tokenizer")
    (second / SHARED).write_text(json.dumps({"tokenizer": "first/tokenizer_2"}))
    assert shared_parts(second) == {"tokenizer": tmp_path / "first" / "tokenizer_2"}
    whole, linked = (load_pipeline("flux", str(tmp_path / name)).pipeline for name in ("first", "second"))
    assert linked.tokenizer("red apple").input_ids == whole.tokenizer_2("red apple").input_ids


def test_the_size_is_known_without_the_weights(assets: Path) -> None:
    for name in ("whole", "tiny-sd"):
        assert geometry_of("sd", str(assets / name)).height == 32


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "cannot be read"),
        ("[1]", "is no list of parts"),
        ('{"vae": "../tiny-flux"}', "expected a model beside it"),
        ('{"vae": 1}', "expected a model beside it"),
        ('{"vae": "tiny-none"}', "takes its vae from tiny-none, and"),
        ('{"lamp": "tiny-flux/vae"}', "names no class of diffusers or transformers for 'lamp'"),
    ],
)
def test_what_cannot_be_linked_says_so(written: str, said: str, assets: Path) -> None:
    broken = assets / "broken"
    shutil.copytree(assets / "tiny-sd", broken, dirs_exist_ok=True)
    (broken / SHARED).write_text(written)
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        load_pipeline("sd", str(broken))
    assert said in str(error.value)
