"""What `--model` names: a folder, a hub id, a type; and what type it is."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xfuser import cli
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.model_types import MODEL_TYPES, shipped_tiny_dit

PIPELINES = {
    "FluxPipeline": "flux",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionPipeline": "sd",
    "DiTPipeline": "dit",
}


def folder_of(pipeline: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def resolved(*arguments: str) -> tuple[str, str | None]:
    args: argparse.Namespace = cli.build_parser().parse_args(["generate", *arguments])
    resolve_model(args)
    return args.model_type, args.model


def refused(*arguments: str) -> str:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        resolved(*arguments)
    return str(error.value)


@pytest.mark.parametrize(("pipeline", "model_type"), PIPELINES.items())
def test_a_folder_tells_its_type(pipeline: str, model_type: str, tmp_path: Path) -> None:
    folder = str(folder_of(pipeline, tmp_path))
    assert resolved("--model", folder) == (model_type, folder)
    assert resolved("--model", folder, "--model_type", model_type) == (model_type, folder)
    if pipeline != "DiTPipeline":
        assert "leave --model_type out" in refused("--model", folder, "--model_type", "tiny-dit")


def test_a_tiny_dit_is_told_from_other_dits(tmp_path: Path) -> None:
    shipped = shipped_tiny_dit()
    assert resolved("--model", str(shipped)) == ("tiny-dit", str(shipped))
    copied = folder_of("DiTPipeline", tmp_path)
    shutil.copytree(shipped / "transformer", copied / "transformer", ignore=lambda *_: ["*.safetensors"])
    assert resolved("--model", str(copied))[0] == "tiny-dit"
    config = json.loads((copied / "transformer" / "config.json").read_text())
    (copied / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 28}))
    assert resolved("--model", str(copied))[0] == "dit"


def test_a_hub_id_tells_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    cached = tmp_path / "models--someone--sigma"
    folder_of("PixArtSigmaPipeline", cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolved("--model", "someone/sigma") == ("pixart", "someone/sigma")
    assert "--model someone/else: no such folder, and nothing on the hub" in refused("--model", "someone/else")


def test_types_and_xdits_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved() == ("tiny-dit", None)
    assert resolved("--model", "sd3") == ("sd3", None)
    assert resolved("--model_type", "flux") == ("flux", None)
    assert "--model_type is tiny-dit" in refused("--model", "sd3", "--model_type", "tiny-dit")
    named = resolved("--model", "FLUX.1-dev", "--model_type", "flux")
    assert named == ("flux", "black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/nowhere", ["--model /nowhere: no such folder"]),
        ("./nowhere", ["--model ./nowhere: no such folder"]),
        ("a/b/c", ["--model a/b/c: no such folder"]),
        ("fluxx", ["--model fluxx: no such folder", "did you mean flux?"]),
        ("zebra", ["--model zebra: no such folder, and no model type; name a folder, a hub id (owner/name) or one of"]),
        ("FILE", ["is a file"]),
        ("EMPTY", ["has no model_index.json"]),
        ("BROKEN", ["cannot be read"]),
        ("OTHER", ["is a HunyuanDiTPipeline", "FluxPipeline", "apply_cache_on_pipeline"]),
    ],
)
def test_what_is_no_model_says_so(model: str, words: list[str], tmp_path: Path) -> None:
    places: dict[str, Any] = {each: tmp_path / each.lower() for each in ("FILE", "EMPTY", "BROKEN", "OTHER")}
    places["FILE"].write_text("")
    places["EMPTY"].mkdir()
    (folder_of("x", places["BROKEN"]) / "model_index.json").write_text("{")
    folder_of("HunyuanDiTPipeline", places["OTHER"])
    said = refused("--model", str(places.get(model, model)))
    assert all(word in said for word in words), said


def test_a_relative_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert refused("--model", "models/mine") == "--model models/mine: no such folder"


def test_pipeline_classes_are_found_by_name() -> None:
    for spec in MODEL_TYPES.values():
        assert tuple(each.__name__ for each in spec.pipeline_classes) == spec.pipelines
