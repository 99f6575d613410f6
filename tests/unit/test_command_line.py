"""What `xdit` says to a person: help at once, one line for every mistake, and what was probably meant."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xfuser
from xfuser import cli
from xfuser.commands import generate as generate_command
from xfuser.config import CacheConfig, FlexibleArgumentParser, ParallelConfig
from xfuser.config.cache import METHODS
from xfuser.config.flags import in_flags
from xfuser.config.spelling import nearest
from xfuser.model_executor.adapters import TYPES
from xfuser.model_executor.cache.adacorrection.trajectory import TrajectoryConfig
from xfuser.model_executor.cache.policies import POLICIES

HEAVY = ("torch", "diffusers", "transformers", "numpy")
LIMIT = 0.5  # seconds until help is there


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line with which `xdit` refuses its arguments."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def asked_for(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    """What `xdit generate` would be run with."""
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(generate_command, "run_generate", seen.append)
    cli.main(list(arguments))
    return seen[0]


# -- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["calibrate", "--help"], ["--version"]])
def test_help_is_there_at_once(arguments: list[str]) -> None:
    code = (
        f"import sys; from xfuser.cli import main\ntry: main({arguments})\n"
        f"except SystemExit: print('imported', [each for each in {HEAVY} if each in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.stdout.rstrip().endswith("imported []")
    # Of the processor: a clock on the wall would measure what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < LIMIT


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"xdit {xfuser.__version__}\n"


def test_help_names_the_defaults_and_what_to_start_with(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for arguments in (["--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        texts.append(" ".join(capsys.readouterr().out.split()))
    assert all("start with: xdit generate --class_label bag shirt --target_speedup 3" in text for text in texts)
    for name, spec in TYPES.items():
        assert f"{name}: {' '.join(f'{method} {value:g}' for method, value in spec.thresholds.items())}" in texts[1]
    assert "--adacorr_tolerance ADACORR_TOLERANCE bound, gate: " in texts[1]


def test_the_methods_on_offer_are_those_that_there_are() -> None:
    assert set(METHODS) == set(POLICIES)


# -- one line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--rel_l1_tresh", "0.1"], ["xdit generate: --rel_l1_tresh", "did you mean --rel_l1_thresh?"]),
        (["generate", "--guidance", "2"], ["did you mean --guidance_scale?"]),
        (["--use-cache", "TeaCache"], ["xdit generate: --use_cache", "did you mean Tea?"]),
        (["generate", "--use_cache", "tea"], ["did you mean Tea?"]),
        (
            ["generate", "--use_cache", "zebra"],
            [f"'zebra' is not known; choose one of {', '.join(map(str, METHODS))}"],
        ),
        (["calibrate", "--levle", "blocks"], ["xdit calibrate: --levle", "did you mean --level?"]),
        (["genrate"], ["xdit: ", "did you mean generate?"]),
        ([], ["xdit: ", "generate, batch or calibrate"]),
        (["generate", "--prompt", "a", "--seed", "1", "red"], ["'red' follows no flag", "quotes"]),
        (["generate", "--guidance_scale", "-1"], ["--guidance_scale", "'-1' is not a number of at least 0"]),
        (["generate", "--overwrite", "--resume"], ["--resume", "--overwrite"]),
        (["generate", "--output_type", "latent"], ["--output_type", "choose one of pil, np"]),
        (["generate", "--class_label", "sneeker", "--threads", "1"], ["did you mean sneaker?"]),
        (["generate", "--use_cache", "Fb", "--rel_l1_thresh", "-1"], ["xdit generate: --rel_l1_thresh -1"]),
        (["generate", "--use_cache", "Tea", "--interval", "4"], ["--interval belongs to --use_cache Interval"]),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ["--output_dir", str(tmp_path / "out")] if "generate" in arguments else []
    line = said(capsys, *arguments, *where)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--rel_l1_thresh", "0.1"], "--rel_l1_thresh"),
        (["--use_cache", "Interval", "--rel_l1_thresh", "0.1"], "--rel_l1_thresh"),
        (["--height", "64"], "--height"),
        (["--width", "64"], "--width"),
        (["--max_sequence_length", "64"], "--max_sequence_length"),
        (["--warmup_steps", "4"], "--warmup_steps"),
        (["--use_cache", "Fb", "--adacorr_gamma", "2"], "--adacorr_gamma"),
        (["--use_cache", "Fb", "--significance", "0.1"], "--significance"),
        (["--use_cache", "Tea", "--interval", "3"], "--interval"),
        (["--use_cache", "Tea", "--sync", "step"], "--sync"),
        (["--model", "flux", "--prompt", "a", "--true_cfg_scale", "0.5"], "--true_cfg_scale"),
        (["--resume", "--target_speedup", "2", "--calibration", "first"], "--resume"),
        (["--model", "sd3", "--prompt", "a", "--negative_prompt", "b", "--guidance_scale", "1"], "--negative_prompt"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(
    arguments: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "generate", *arguments).startswith(f"xdit generate: {flag}")


def test_a_folder_that_cannot_be_written_names_its_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = said(capsys, "generate", "--class_label", "0", "--output_dir", "/proc/xdit/out")
    assert line.startswith("xdit generate: --output_dir: nothing can be written in /proc")
    line = said(capsys, "calibrate", "--output", "/proc/xdit/mine.safetensors")
    assert line.startswith("xdit calibrate: --output: ")


# -- xDiT's command --------------------------------------------------------------------------------------------------


def test_without_a_command_it_is_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--model FLUX.1-dev --prompt fox --num-inference-steps 3 --guidance-scale=2 --output-directory here"
    args = asked_for(monkeypatch, *flags.split(), "--max_sequence_length", "128", "--output_type", "np")
    assert (args.command, args.model, args.prompt) == ("generate", "FLUX.1-dev", ["fox"])
    assert (args.num_inference_steps, args.guidance_scale, args.output_dir) == (3, 2.0, Path("here"))
    assert (args.max_sequence_length, args.save_raw) == (128, True)
    assert args.argv[0] == "generate"


def test_dashes_in_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_for(monkeypatch, "--prompt", "a-b c-d", "--model=my-flux").prompt == ["a-b c-d"]
    assert asked_for(monkeypatch, "generate", "--model=my-flux", "--prompt", "a").model == "my-flux"


# Of xDiT's runner (0.4.5 and later), but for what is carried over.
RUNNER = """attention_backend cross_attention_backend dataset_path distilled_transformer_path enable_model_cpu_offload
flow_shift fp8_precision_override_prefix_patterns fully_shard_degree guidance_scale_2 hybrid_attn_schedule input_images
lora_path master_port memory_efficient_sharding nnodes no-spargeattn_reorder_sequence no_reshard_after_forward
nproc_per_node num_frames num_hybrid_attn_high_precision_steps num_iterations profile profile_wait resize_input_images
spargeattn_simthreshold task tensor_parallel_degree use-hybrid-attn-schedule use_fp8_gemms use_spargeattn_head_balance
use_ssta_sparse_text_to_image use_vae_channels_last_format vsa_top_k use_vsa_static_block_mask warmup_calls""".split()


@pytest.mark.parametrize("flag", RUNNER)
def test_the_runners_other_flags_are_refused_by_name(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "--model", "FLUX.1-dev", "--prompt", "a", f"--{flag}", "1")
    assert line.startswith(f"xdit generate: --{flag} is not supported: ")


def test_a_scripts_parser_suggests_too(capsys: pytest.CaptureFixture[str]) -> None:
    parser = FlexibleArgumentParser(prog="script")
    parser.add_argument("--ulysses_degree", type=int)
    assert parser.parse_args(["--ulysses-degree", "2"]).ulysses_degree == 2
    with pytest.raises(SystemExit):
        parser.parse_args(["--ulises_degree", "2"])
    assert capsys.readouterr().err == "script: error: --ulises_degree is not known; did you mean --ulysses_degree?\n"


# -- in Python -------------------------------------------------------------------------------------------------------


def test_none_is_none_in_python_too() -> None:
    assert CacheConfig(use_cache="None") == CacheConfig()


@pytest.mark.parametrize("name", ["nonsense", "TeaCache", "tea", 3, True])
def test_a_method_that_is_not_known_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=f"^use_cache=.* is not known; [^\n]*'{METHODS[-1]}'$") as error:
        CacheConfig(use_cache=name)  # type: ignore[arg-type]
    assert ("did you mean 'Tea'?" in str(error.value)) == (isinstance(name, str) and name.lower().startswith("tea"))


@pytest.mark.parametrize("settings", [{}, {"use_cache": "Interval"}])
def test_a_threshold_that_nothing_reads_is_refused_in_python(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="rel_l1_thresh belongs to"):
        CacheConfig(rel_l1_thresh=0.1, **settings)


def test_an_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"rel_l1_tresh; did you mean rel_l1_thresh\?"):
        CacheConfig.from_keywords(use_cache="Fb", rel_l1_tresh=0.1)


def test_numbers_of_numpy_are_numbers() -> None:
    config = CacheConfig(
        use_cache="Fb",
        rel_l1_thresh=np.float32(0.5),  # type: ignore[arg-type]
        num_steps=np.int64(7),  # type: ignore[arg-type]
        enable_adacorrection=True,
        adacorr_budget=np.float64(0.25),
    )
    assert config == CacheConfig("Fb", 0.5, 7, enable_adacorrection=True, adacorr_budget=0.25)
    assert [type(value) for value in (config.rel_l1_thresh, config.num_steps)] == [float, int]
    assert type(TrajectoryConfig(min_psnr=np.float32(40), calibration_images=np.int32(2)).calibration_images) is int
    assert ParallelConfig(ulysses_degree=np.int64(2)).world_size == 2
    for wrong in (np.float32("nan"), np.bool_(True), np.zeros(2)):
        with pytest.raises(ValueError, match="rel_l1_thresh"):
            CacheConfig(use_cache="Fb", rel_l1_thresh=wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rel_l1_thresh=-1: expected a number, at least 0", "--rel_l1_thresh -1: expected a number, at least 0"),
        ("granularity='token' belongs to adacorr_mode='gate'", "--granularity token belongs to --adacorr_mode gate"),
        ("AdaCorrection is off; add enable_adacorrection=True", "AdaCorrection is off; add --enable_adacorrection"),
        ("calibration: it was made with 20 steps", "--calibration: it was made with 20 steps"),
        ("the calibration is old; set num_steps", "the calibration is old; set --num_inference_steps"),
        ("could not begin: calibration: gone", "could not begin: --calibration: gone"),
        ("--use_cache Fb is fine", "--use_cache Fb is fine"),
        ("an interval of 3 steps", "an interval of 3 steps"),
    ],
)
def test_errors_speak_of_flags(text: str, expected: str) -> None:
    assert in_flags(text) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [("FBCache", "Fb"), ("FastCache", "Fast"), ("INTERVAL", "Interval"), ("interva", "Interval"), ("Full", None)],
)
def test_the_nearest_name(word: str, expected: str | None) -> None:
    assert nearest(word, ("None", "Fast", "Tea", "Fb", "Interval")) == expected
