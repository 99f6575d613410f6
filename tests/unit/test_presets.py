"""Published models by name: what is loaded for them, from a small pipeline of the same classes, and what wins."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written_tables import assert_written

from benchmark import cache_execute
from benchmark.judge import closeness
from evaluation.metrics import psnr
from xfuser import cli
from xfuser.model_executor.adapters import SMALL, SPECS
from xfuser.model_executor.pipelines import MODEL_TYPES, load_pipeline
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.geometry import geometry_of
from xfuser.model_executor.pipelines.presets import PRESETS
from xfuser.ray.batch.requests import Rules

# By preset, the small pipeline of the same classes.
SMALL_ONES = {
    "dit-b-2": "dit",
    "dit-l-2": "dit",
    "dit-xl-2": "dit",
    "pixart-alpha": "pixart",
    "pixart-sigma": "pixart-sigma",
    "sd-1.5": "unet",
    "sd-3.5": "sd3",
    "flux-dev": "flux",
    "flux-schnell": "flux",
    "wan-2.1": "wan",
}
# So that nothing is drawn at the published sizes here.
SIZES = {"height": 64, "width": 64}
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- presets: begin -->", "<!-- presets: end -->"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved small pipeline for each preset."""
    folder = tmp_path_factory.mktemp("presets")
    for name in dict.fromkeys(SMALL_ONES.values()):
        SMALL[name].build().save_pretrained(folder / name)
    return {preset: folder / name for preset, name in SMALL_ONES.items()}


def resolved(command: str, *arguments: str) -> argparse.Namespace:
    args = cli.build_parser().parse_args([command, *arguments])
    resolve_model(args)
    return args


# -- what a name stands for --------------------------------------------------------------------------------------------


def test_all_that_the_project_speaks_of_are_there() -> None:
    assert set(PRESETS) == set(SMALL_ONES)
    for name, preset in PRESETS.items():
        assert MODEL_TYPES[name] is preset.kind
        assert (preset.kind.default is None) == bool(preset.kind.unpublished), name
        assert set(preset.kind.thresholds) == {"Fast", "Tea", "Fb"}


@pytest.mark.parametrize("command", ["generate", "calibrate"])
def test_the_command_takes_the_presets_steps_unless_some_are_named(command: str) -> None:
    args = resolved(command, "--model", "flux-schnell")
    assert (args.model_type, args.model, args.num_inference_steps) == ("flux-schnell", None, 4)
    # Fifty is the default of others, and here a wish like any other.
    assert resolved(command, "--model", "flux-schnell", "--num_inference_steps", "50").num_inference_steps == 50
    assert resolved(command, "--model", "sd-3.5").num_inference_steps == 28


def test_cache_execute_knows_them() -> None:
    args = cache_execute.parser().parse_args(["--model", "pixart-sigma"])
    resolve_model(args)
    assert (args.model_type, args.num_inference_steps) == ("pixart-sigma", 20)
    sampling = cache_execute.sampling_of(args)
    assert (sampling.guidance_scale, sampling.num_inference_steps) == (4.5, 20)


@pytest.mark.parametrize("name", ["dit-b-2", "dit-l-2"])
def test_what_nobody_has_published_wants_a_folder(
    name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: [^\n]*XL/2 only[^\n]*name the folder[^\n]*$"):
        load_pipeline(name)
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", name, "--class_label", "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "name the folder of a DiTPipeline with --model" in line
    args = resolved("generate", "--model_type", name, "--model", str(folders[name]))
    assert (args.model_type, args.model) == (name, str(folders[name]))


def test_a_folder_is_of_its_general_type_unless_a_preset_is_named(folders: dict[str, Path]) -> None:
    assert resolved("generate", "--model", str(folders["flux-dev"])).model_type == "flux"
    args = resolved("generate", "--model", str(folders["flux-dev"]), "--model_type", "flux-dev")
    assert (args.model_type, args.num_inference_steps) == ("flux-dev", 50)


def test_there_is_no_toy_of_a_published_model() -> None:
    with pytest.raises(ValueError, match="no toy model of type 'flux-dev'"):
        load_pipeline("flux-dev", "toy")


# -- loading and calling, at toy size ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_and_draws(name: str, folders: dict[str, Path]) -> None:
    loaded = load_pipeline(name, str(folders[name]))
    kind = PRESETS[name].kind
    assert type(loaded.denoiser).__name__ == kind.transformer_class
    arguments = loaded.arguments([1] if kind.conditioned_on == "label" else ["red apple"], [0], 2)
    assert arguments["guidance_scale"] == kind.guidance_scale
    assert kind.call_arguments.items() <= arguments.items()
    small = SMALL[SMALL_ONES[name]].call(1)  # nobody waits here for an image of 1024 x 1024, or for 81 frames
    if "prompt_embeds" in small:
        del arguments["prompt"]
    images = getattr(loaded.pipeline(**(arguments | small)), kind.makes)
    assert len(images) == 1 and images.std() > 0 and np.isfinite(images).all()


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].kind.conditioned_on == "prompt"])
def test_a_named_argument_goes_before_the_presets(name: str, folders: dict[str, Path]) -> None:
    loaded = load_pipeline(name, str(folders[name]))
    named = loaded.arguments(["red apple"], [0], 3, guidance_scale=1.25, **SIZES)
    assert SIZES.items() <= named.items()
    assert (named["guidance_scale"], named["num_inference_steps"]) == (1.25, 3)


def test_the_published_size_is_known_without_the_weights(folders: dict[str, Path]) -> None:
    flux = geometry_of("flux-dev", str(folders["flux-dev"]))
    assert (flux.height, flux.width) == (1024, 1024)
    assert flux.tokens == (1024 // flux.multiple) ** 2
    wan = geometry_of("wan-2.1", str(folders["wan-2.1"]))
    assert (wan.height, wan.width) == (480, 832)
    # 21 latent frames of 480 / 8 / 2 rows and 832 / 8 / 2 columns.
    assert wan.tokens == 21 * 30 * 52
    assert wan.blocks == 4 and wan.heads == 4


# -- videos ------------------------------------------------------------------------------------------------------------


def test_a_video_becomes_an_animation(tmp_path: Path) -> None:
    cli.main(
        ["generate", "--model", "wan", "--prompt", "a fox", "--num_inference_steps", "3", "--guidance_scale", "1"]
        + ["--save_raw", "--output_dir", str(tmp_path)]
    )
    raw = np.load(tmp_path / "images.npy")
    assert raw.shape == (1, 5, 64, 64, 3)
    drawn = Image.open(tmp_path / "image_00000.png")
    assert drawn.n_frames == 5
    for index, frame in enumerate(raw[0]):
        drawn.seek(index)
        assert np.array_equal(np.asarray(drawn.convert("RGB")), np.round(frame * 255).astype(np.uint8))


def test_a_jpeg_of_a_video_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", "wan", "--prompt", "a fox", "--image_format", "jpg"])
    assert "makes videos; use png or webp" in capsys.readouterr().err


def test_a_batch_job_of_videos_is_refused() -> None:
    with pytest.raises(ValueError, match="wan makes videos, and a job's lines ask for images; use xdit generate"):
        Rules.of("wan", None, 10)


def test_videos_are_compared_over_all_frames() -> None:
    rng = np.random.default_rng(0)
    videos, references = rng.random((2, 2, 3, 16, 16, 3)).astype(np.float32)
    near, alike = closeness(videos, references)
    errors = ((videos.astype(np.float64) - references) ** 2).mean(axis=(1, 2, 3, 4))
    assert np.allclose(near, -10 * np.log10(errors))
    assert np.allclose(closeness(videos[:, 0], references[:, 0])[0], psnr(videos[:, 0], references[:, 0]))
    assert np.allclose(alike, np.mean([closeness(videos[:, i], references[:, i])[1] for i in range(3)], axis=0))


# -- the docs ----------------------------------------------------------------------------------------------------------


def table() -> str:
    """The presets as the docs list them."""
    lines = ["| name | hub id | steps | guidance | size | from | thresholds |", "|---|---|---|---|---|---|---|"]
    for name, preset in PRESETS.items():
        kind = preset.kind
        call = kind.call_arguments
        size = f"{call['width']} x {call['height']}" if call else "256 x 256"
        size += f", {call['num_frames']} frames" if "num_frames" in call else ""
        hub_id = f"`{kind.default}`" if kind.default else "none: name a folder with `--model`"
        cells = (f"`{name}`", hub_id, f"{kind.num_inference_steps}", f"{kind.guidance_scale:g}", size)
        lines.append(f"| {' | '.join((*cells, preset.numbers, preset.thresholds))} |")
    return "\n".join(lines) + "\n"


def test_the_docs_list_the_presets() -> None:
    assert_written(TABLE, BEGIN, table(), END)


def test_the_polynomial_is_published_where_the_table_says_so() -> None:
    with_one = {name for name, preset in PRESETS.items() if SPECS[preset.kind.transformer_class].tea_coefficients}
    assert with_one == {"flux-dev", "flux-schnell"}
    assert json.dumps(MODEL_TYPES["flux-dev"].thresholds) == json.dumps({"Fast": 0.05, "Tea": 0.4, "Fb": 0.08})
