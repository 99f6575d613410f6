"""xDiT's names: what they carry over, and what they say where they do not."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

import xfuser
from xfuser.config import EngineConfig, FlexibleArgumentParser, InputConfig, xFuserArgs
from xfuser.core.distributed import get_runtime_state, get_world_group
from xfuser.model_executor.adapters import SMALL, SmallPipeline
from xfuser.model_executor.adapters.flux import build_small as build_toy_flux
from xfuser.model_executor.parallel.batch import part_of_batch
from xfuser.xdit import pipelines as upstream
from xfuser.xdit.table import WRAPPED

SIZE = {"height": 64, "width": 64, "max_sequence_length": 64}
CALL = SIZE | {"num_inference_steps": 4, "output_type": "np"}
ADACORRECTION = {"use_cache": "Tea", "enable_adacorrection": True, "adacorr_budget": 0.5}
PROMPTS = ["a red cube", "two birds", "an old map"]


@pytest.fixture(autouse=True)
def _parted() -> Iterator[None]:
    """No degrees are in force before and after a test."""
    yield
    if xfuser.core.distributed.model_parallel_is_initialized():
        get_runtime_state().destroy_distributed_env()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    build_toy_flux().save_pretrained(folder)
    return folder


def parsed(*flags: str) -> Namespace:
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(prog="script"))
    return parser.parse_args(["--model", "somewhere", *flags])


def configured(*flags: str) -> tuple[EngineConfig, InputConfig]:
    return xFuserArgs.from_cli_args(parsed(*flags)).create_config()


def toy(settings: dict[str, Any] | None = None, *flags: str) -> upstream.xFuserFluxPipeline:
    engine_config, _ = configured(*flags)
    pipe = upstream.xFuserFluxPipeline(build_toy_flux(), engine_config, settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompt: Any = "a red cube", **arguments: Any) -> np.ndarray:
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(5), **(CALL | arguments)).images


@pytest.mark.parametrize("small", [each for each in SMALL.values() if f"xFuser{each.pipeline}" in WRAPPED])
def test_every_wrapper_generates_what_its_pipeline_does(small: SmallPipeline) -> None:
    engine_config, input_config = configured("--height", "64", "--width", "64", "--no_use_resolution_binning")
    pipeline = small.build()
    pipeline.set_progress_bar_config(disable=True)
    call = small.call(1) | {"num_inference_steps": 2, "output_type": "np"}
    expected = pipeline(**call, generator=torch.Generator().manual_seed(5)).images
    pipe = getattr(xfuser, f"xFuser{small.pipeline}")(pipeline, engine_config)
    pipe.prepare_run(input_config)
    assert np.array_equal(pipe(**call, generator=torch.Generator().manual_seed(5)).images, expected)


# -- the command line -------------------------------------------------------------------------------------------------


def test_a_command_line_arrives_in_the_configs() -> None:
    flags = (
        "--height 64 --width 32 --num-inference-steps 7 --seed 9 --guidance_scale 2 --output_type np --warmup-steps 2"
    )
    engine_config, input_config = configured(*flags.split(), "--enable_tiling", "--prompt", *PROMPTS)
    assert engine_config.model_config.model == "somewhere"
    assert engine_config.runtime_config.enable_tiling and not engine_config.runtime_config.enable_slicing
    assert engine_config.parallel_config.warmup_steps == 1  # PipeFusion's, which is off
    assert (engine_config.parallel_config.dp_degree, engine_config.parallel_config.pp_degree) == (1, 1)
    assert (input_config.height, input_config.width, input_config.num_inference_steps) == (64, 32, 7)
    assert (input_config.seed, input_config.guidance_scale, input_config.output_type) == (9, 2.0, "np")
    assert (input_config.prompt, input_config.batch_size) == (PROMPTS, 3)
    assert (get_world_group().rank, get_world_group().world_size, get_world_group().local_rank) == (0, 1, 0)


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor_parallel_degree 2",
        "--fully-shard-degree 2",
        "--use_fp8_t5_encoder",
        "--use_int8_gemms",
        "--enable_model_cpu_offload",
        "--no_such_flag",
        "--height 0",
    ],
)
def test_a_flag_that_is_refused_is_named_in_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parsed(*flags.split())
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1
    assert flags.split()[0].replace("-", "_") in lines[0].replace("-", "_")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tensor_parallel_degree": 2}, "--tensor_parallel_degree 2"),
        ({"ulysses_degree": 2}, "--nproc_per_node"),
        ({"use_teacache": True, "use_fbcache": True}, "two base methods"),
        ({"adacorr_budget": 0.5}, "--enable_adacorrection"),
        ({"num_pipeline_patch": 2}, "--pipefusion_parallel_degree"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, "--negative_prompt"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        xFuserArgs(model="somewhere", **settings).create_config()
    assert named in str(error.value)


def test_names_are_found_where_scripts_look_for_them() -> None:
    assert xfuser.xDiTParallel is importlib.import_module("xfuser.parallel").xDiTParallel
    for name in ("PixArtAlpha", "PixArtSigma", "Flux", "StableDiffusion3"):
        wrapper = getattr(xfuser, f"xFuser{name}Pipeline")
        assert wrapper.diffusers_class.__name__ == f"{name}Pipeline"


# -- cache settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ({"use_teacache": False, "use_fbcache": False, "rel_l1_thresh": 0.12}, "", {}),
        ({"use_teacache": True, "rel_l1_thresh": 0.12}, "", {"use_cache": "Tea", "rel_l1_thresh": 0.12}),
        ({"use_fbcache": True}, "", {"use_cache": "Fb", "rel_l1_thresh": 0.08}),
        (None, "--use_teacache", {"use_cache": "Tea", "rel_l1_thresh": 0.4}),
        # The command line's method, with the script's threshold only where the script did not mean another method.
        ({"rel_l1_thresh": 0.12}, "--use_cache Fast", {"use_cache": "Fast", "rel_l1_thresh": 0.12}),
        ({"use_teacache": True, "rel_l1_thresh": 0.12}, "--use_fbcache", {"use_cache": "Fb", "rel_l1_thresh": 0.08}),
        (
            {"use_cache": "Fast", "motion_threshold": 0.1},
            "--use_cache Interval --interval 2",
            {"use_cache": "Interval", "interval": 2},
        ),
        ({"use_teacache": True}, "--use_cache None", {"use_cache": None}),
        (
            {"use_fbcache": True, "rel_l1_thresh": 0.12},
            "--rel_l1_thresh 0.3",
            {"use_cache": "Fb", "rel_l1_thresh": 0.3},
        ),
        (
            {"use_fbcache": True, "rel_l1_thresh": 1, "enable_adacorrection": True, "adacorr_budget": 0.5},
            "--enable_adacorrection --adacorr_tolerance 0.1",
            {"use_cache": "Fb", "rel_l1_thresh": 1, "enable_adacorrection": True, "adacorr_tolerance": 0.1},
        ),
    ],
)
def test_the_command_line_goes_before_the_script(
    script: dict[str, Any] | None, flags: str, expected: dict[str, Any]
) -> None:
    assert toy(script, *flags.split())._settings == expected


@pytest.mark.parametrize(
    ("script", "error", "named"),
    [
        ({"use_teacache": True, "use_fbcache": True}, ValueError, "two base methods"),
        ({"use_tea": True}, TypeError, "use_tea"),
        ({"use_fbcache": True, "rel_l1_thresh": -1}, ValueError, "rel_l1_thresh"),
    ],
)
def test_cache_args_that_are_refused(script: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        toy(script)


# -- loading ----------------------------------------------------------------------------------------------------------


def test_loading_passes_on_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def load(name: str, **keywords: Any) -> Any:
        seen.append(keywords)
        return build_toy_flux()

    monkeypatch.setattr(FluxPipeline, "from_pretrained", load)
    engine_config, _ = configured("--download_dir", "kept", "--enable_tiling", "--enable_slicing")
    engine_config.runtime_config.dtype = torch.bfloat16
    for given in ({"trust_remote_code": True}, {"torch_dtype": torch.float16, "cache_dir": "mine"}):
        pipe = upstream.xFuserFluxPipeline.from_pretrained("somewhere", engine_config, variant="x", **given)
        assert pipe.vae.use_tiling and pipe.vae.use_slicing
    common = {"use_safetensors": True, "variant": "x"}
    assert seen[0] == common | {upstream.DTYPE: torch.bfloat16, "cache_dir": "kept"}
    assert seen[1] == common | {upstream.DTYPE: torch.float16, "cache_dir": "mine"}


@pytest.mark.parametrize(
    "keywords", [{"use_safetensors": False}, {"device_map": "auto"}, {"quantization_config": {"bits": 4}}]
)
def test_loading_refuses_by_name(keywords: dict[str, Any]) -> None:
    engine_config, _ = configured()
    with pytest.raises(ValueError, match=f"{next(iter(keywords))}=.* is not supported: [^\n]+$"):
        upstream.xFuserFluxPipeline.from_pretrained("somewhere", engine_config, **keywords)


def test_loading_from_nowhere_is_one_line(tmp_path: Path) -> None:
    engine_config, _ = configured()
    with pytest.raises(ValueError, match="^cannot load '[^\n]*' as FluxPipeline: [^\n]+$"):
        upstream.xFuserFluxPipeline.from_pretrained(str(tmp_path), engine_config)


def test_what_create_config_has_settled_cannot_be_changed() -> None:
    for name, value in (("warmup_steps", 4), ("use_parallel_vae", True)):
        engine_config, _ = configured()
        setattr(engine_config.runtime_config, name, value)
        with pytest.raises(ValueError, match=f"^runtime_config.{name}="):
            upstream.xFuserFluxPipeline(build_toy_flux(), engine_config)


# -- the pipeline -----------------------------------------------------------------------------------------------------


def test_a_script_draws_what_diffusers_draws(folder: Path) -> None:
    engine_config, input_config = configured("--height", "64", "--width", "64", "--max_sequence_length", "64")
    pipe = upstream.xFuserFluxPipeline.from_pretrained(folder, engine_config=engine_config).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    plain = drawn(pipe.pipeline)
    pipe.prepare_run(input_config)
    assert np.array_equal(drawn(pipe), plain)
    assert pipe.is_dp_last_group()


@pytest.mark.parametrize("method", [{"use_teacache": True}, ADACORRECTION])
@pytest.mark.parametrize("calibration", [{}, {"calibration": "first"}])
def test_a_warm_up_leaves_nothing_behind(method: dict[str, Any], calibration: dict[str, Any]) -> None:
    arguments = InputConfig(**SIZE, num_inference_steps=8, output_type="np", prompt="")
    images, hits = [], []
    for warm in (False, True):
        pipe = toy(method | calibration)
        if warm:
            pipe.prepare_run(arguments, steps=8)
            assert pipe.parallel.summary()["steps"] == 0
            assert pipe.parallel.partition.warmup_steps == 1
        images += [drawn(pipe, num_inference_steps=8) for _ in range(2)]
        hits.append(pipe.parallel.summary()["hit_rate"])
    assert np.array_equal(images[0], images[2]) and np.array_equal(images[1], images[3])
    assert hits[0] == hits[1] > 0


def test_attributes_are_the_pipelines_own() -> None:
    pipe = toy()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe.scheduler = scheduler
    assert pipe.pipeline.scheduler is scheduler and pipe.transformer is pipe.pipeline.transformer
    assert pipe.to(torch.float32) is pipe
    with pytest.raises(AttributeError, match="--pipefusion_parallel_degree"):
        pipe.enable_model_cpu_offload()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = pipe.no_such_thing
    assert pipe.parallel.pipeline is pipe.pipeline
    with pytest.raises(ValueError, match="^scheduler: .* before the first call$"):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()


def test_a_pipeline_needs_degrees_that_are_in_force() -> None:
    pipe = toy()
    get_runtime_state().destroy_distributed_env()
    with pytest.raises(RuntimeError, match=r"create_config\(\)"):
        drawn(pipe)
    configured("--verify_agreement")
    with pytest.raises(ValueError, match=r"create_config\(\)"):
        drawn(pipe)


def test_another_familys_pipeline_is_refused() -> None:
    engine_config, input_config = configured()
    with pytest.raises(TypeError, match="takes a PixArtSigmaPipeline, not a FluxPipeline"):
        upstream.xFuserPixArtSigmaPipeline(build_toy_flux(), engine_config)
    with pytest.raises(TypeError, match="does not take a dict; give it one of"):
        upstream.xDiTParallel({}, engine_config, input_config)


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_images_are_saved_whole_and_by_place(output_type: str, tmp_path: Path) -> None:
    sizes = ("--height", "64", "--width", "64", "--max_sequence_length", "64")
    spread = upstream.xDiTParallel(build_toy_flux(), *configured(*sizes))
    spread.pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="before save"):
        spread.save(tmp_path / "new", "flux")
    spread(prompt=PROMPTS[:2], generator=torch.Generator().manual_seed(5), **(CALL | {"output_type": output_type}))
    paths = spread.save(tmp_path / "new", "flux")
    assert sorted((tmp_path / "new").iterdir()) == paths
    assert [path.name.rpartition("_dprank")[2] for path in paths] == ["0_image0.png", "0_image1.png"]
    assert [Image.open(path).size for path in paths] == [(64, 64)] * 2
    spread(prompt="a", **(CALL | {"output_type": "latent"}))
    with pytest.raises(ValueError, match="--output_type pil or np"):
        spread.save(tmp_path / "new", "latent")


# -- parts of a batch -------------------------------------------------------------------------------------------------


def test_every_group_takes_its_part() -> None:
    generators = [torch.Generator() for _ in range(6)]
    whole = {
        "prompt": PROMPTS,
        "negative_prompt": ["x", "y", "z"],
        "num_images_per_prompt": 2,
        "generator": generators,
        "latents": torch.arange(6),
        "height": 64,
    }
    first, second = (part_of_batch(whole, group, 2) for group in range(2))
    assert first is not None and second is not None
    assert first["prompt"] == PROMPTS[:2] and second["prompt"] == PROMPTS[2:]
    assert first["negative_prompt"] == ["x", "y"] and second["negative_prompt"] == ["z"]
    assert first["generator"] == generators[:4] and second["generator"] == generators[4:]
    assert first["latents"].tolist() == [0, 1, 2, 3] and second["latents"].tolist() == [4, 5]
    assert first["height"] == second["height"] == 64


def test_what_every_group_shares() -> None:
    generator = torch.Generator()
    alone = {"prompt": ["a"], "generator": generator}
    assert part_of_batch(alone, 1, 2) == alone
    part = part_of_batch({"prompt": PROMPTS, "negative_prompt": "x", "generator": generator}, 1, 2)
    assert part == {"prompt": PROMPTS[2:], "negative_prompt": "x", "generator": generator}
    embedded = part_of_batch({"prompt_embeds": torch.zeros(4, 2), "pooled_prompt_embeds": torch.ones(4, 1)}, 1, 2)
    assert embedded is not None and embedded["prompt_embeds"].shape == (2, 2)


def test_a_group_that_no_prompt_reaches() -> None:
    assert [part_of_batch({"prompt": ["a"] * 5}, group, 4) is None for group in range(4)] == [False] * 3 + [True]


def test_other_numbers_than_of_prompts_are_refused() -> None:
    for name, value in (("negative_prompt", ["x"] * 2), ("generator", [torch.Generator()]), ("latents", torch.ones(4))):
        with pytest.raises(ValueError, match=f"^{name}: . given for 3 prompts; give 3"):
            part_of_batch({"prompt": PROMPTS, name: value}, 0, 2)
