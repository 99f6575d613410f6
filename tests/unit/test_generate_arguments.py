"""`xdit generate`'s flags for many processes: what is refused, and what reaches the launcher."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xfuser import cli
from xfuser.config.refused import FURTHER, PREFIXES, RefusedArguments
from xfuser.core.distributed import launch

TWICE = {"two methods": ["--use_teacache", "--use_cache", "Fb"], "two aliases": ["--use_teacache", "--use_fbcache"]}
WRONG = {
    "heads": (["--ulysses_degree", "3"], "4 attention heads"),
    "blocks": (["--pipefusion_parallel_degree", "13"], "12 blocks"),
    "tokens": (["--ring_degree", "65"], "64 tokens"),
    "patches": (["--pipefusion_parallel_degree", "2", "--num_pipeline_patch", "65"], "64 image tokens"),
    "a split": (["--pipefusion_parallel_degree", "2", "--attn_layer_num_for_pp", "5", "6"], "12 blocks"),
    "another model's blocks": (["--model", "flux", "--prompt", "a", "--pipefusion_parallel_degree", "9"], "8 blocks"),
    "replicas": (["--data_parallel_degree", "3", "--class_label", "0", "1"], "only 2 images"),
    "one branch": (["--use_cfg_parallel", "--guidance_scale", "1"], "--guidance_scale above 1"),
    "flux's branches": (["--model", "flux", "--prompt", "a", "--use_cfg_parallel"], "--true_cfg_scale"),
    "half of guidance": (["--model", "flux", "--prompt", "a", "--negative_prompt", "b"], "--true_cfg_scale"),
    "true guidance elsewhere": (["--model", "sd3", "--prompt", "a", "--true_cfg_scale", "2"], "--guidance_scale"),
    "a negative label": (["--negative_prompt", "b"], "--negative_prompt"),
    "an autoencoder alone": (["--use_parallel_vae"], "--use_parallel_vae"),
    "rows": (["--ring_degree", "16", "--use_parallel_vae"], "8 rows"),
    "tiles and bands": (["--ring_degree", "2", "--use_parallel_vae", "--enable_tiling"], "--enable_tiling"),
    "tokens of its own": (
        ["--ulysses_degree", "2", "--use_cache", "Fast", "--motion_threshold", "0.5"],
        "motion_threshold",
    ),
    "a device of no machine": (["--device", "gpu"], "choose one of auto, cpu"),
    "two models": (["--model", "flux", "--model_type", "sd3", "--prompt", "a"], "--model_type"),
} | {name: (flags, "different methods") for name, flags in TWICE.items()}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line with which the command refuses its arguments."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", *arguments])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("xdit generate: ")
    return lines[0]


REFUSED = [f"--{name}" for name in (*(each.name for each in fields(RefusedArguments)), *FURTHER)]


@pytest.mark.parametrize("flag", [*REFUSED, *(f"--{prefix}something" for prefix in PREFIXES)])
def test_what_upstream_has_and_this_has_not(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, flag, "2").startswith(f"xdit generate: {flag} is not supported: ")
    assert refusal(capsys, f"{flag}=2").startswith(f"xdit generate: {flag} is not supported: ")


def test_no_refused_flag_is_one_of_ours() -> None:
    known = vars(cli.build_parser().parse_args(["generate"]))
    assert not {flag.removeprefix("--") for flag in REFUSED} & set(known)


@pytest.mark.parametrize(("arguments", "word"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*unused: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("xfuser.model_executor.pipelines.load_pipeline", load)
    monkeypatch.setattr(launch, "start_processes", load)
    assert word in refusal(capsys, *arguments, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [None, Path("generate.py")])
def test_degrees_start_their_processes_and_pass_the_exit_code_on(
    script: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(launch, "start_processes", lambda *what: started.append(what) or 7)
    arguments = ["generate", "--ulysses_degree", "2", "--use_cfg_parallel"]
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments, script)
    assert caught.value.code == 7
    assert started == [(4, arguments if script is None else arguments[1:], script)]


@pytest.mark.parametrize(("flag", "method"), [("--use_teacache", "Tea"), ("--use_fbcache", "Fb")])
def test_aliases_of_methods(flag: str, method: str) -> None:
    for further in ([], ["--use_cache", method]):
        args = cli.build_parser().parse_args(["generate", flag, *further])
        assert cli.cache_settings(args, {method: 0.25})["use_cache"] == method
        assert cli.cache_settings(args, {method: 0.25})["rel_l1_thresh"] == 0.25


def test_evidence_of_one_process(tmp_path: Path) -> None:
    arguments = ["--model", "tiny-dit", "--class_label", "0", "1", "--num_inference_steps", "6", "--threads", "1"]
    cli.main(["generate", *arguments, "--use_fbcache", "--save_raw", "--enable_slicing", "--output_dir", str(tmp_path)])
    told = json.loads((tmp_path / "statistics.json").read_text())
    raw = np.load(tmp_path / "images.npy")
    assert raw.shape == (2, 32, 32, 1) and raw.dtype == np.float32 and 0 <= raw.min() <= raw.max() <= 1
    for index, pixels in enumerate(raw):
        written = np.asarray(Image.open(tmp_path / f"image_{index:05d}.png"))
        assert np.array_equal(written, np.round(pixels[..., 0] * 255).astype(np.uint8))
    assert told["mesh"] == {"data": 1, "cfg": 1, "pipefusion": 1, "ring": 1, "ulysses": 1}
    assert told["settings"]["cache"]["use_cache"] == "Fb" and told["settings"]["parallel"]["ulysses_degree"] == 1
    assert (told["collectives_per_step"], told["bytes_per_step"]) == (0, 0)
    assert told["plan_digests"] == [told["cache"]["plan_digest"]] and told["hit_rate"] == told["cache"]["hit_rate"]
    for name in ("plan", "weights", "offsets"):
        (table,) = told[name].values()
        assert len(table) == 6 and all(len(step) == 12 for step in table)
    assert len(told["parameter_bytes"]) == 1 and "replicas" not in told
    assert len(list(tmp_path.iterdir())) == 4


def test_guidance_of_two_calls_reaches_flux(tmp_path: Path) -> None:
    arguments = ["--model", "flux", "--prompt", "a", "--num_inference_steps", "2", "--threads", "1", "--save_raw"]
    for name, more in {"plain": [], "guided": ["--negative_prompt", "b", "--true_cfg_scale", "3"]}.items():
        cli.main(["generate", *arguments, *more, "--output_dir", str(tmp_path / name)])
    told = json.loads((tmp_path / "guided" / "statistics.json").read_text())
    assert told["cache"]["branches"] == 2
    plain, guided = (np.load(tmp_path / name / "images.npy") for name in ("plain", "guided"))
    assert np.abs(plain - guided).max() > 1e-3
