"""What scripts that spread a transformer by themselves set and ask for, on one process."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from xfuser.config import FlexibleArgumentParser, ParallelConfig, xFuserArgs
from xfuser.config.diffusers import get_minimum_diffusers_version, has_valid_diffusers_version
from xfuser.core.distributed import (
    environment,
    get_dit_group,
    get_runtime_state,
    get_sp_group,
    get_tensor_model_parallel_rank,
    get_world_group,
    init_distributed_environment,
    initialize_model_parallel,
    initialize_runtime_state,
    model_parallel_is_initialized,
    runtime_state_is_initialized,
)
from xfuser.core.long_ctx_attention import xFuserLongContextAttention
from xfuser.model_executor.adapters.flux import build_small as build_toy_flux
from xfuser.xdit.diffusers_versions import MINIMUM
from xfuser.xdit.parallel_state import destroy_distributed_environment, destroy_model_parallel

CPU = torch.device("cpu")
SHAPE = (2, 6, 4, 8)  # images, tokens, heads, channels
JOINT = ("joint_tensor_query", "joint_tensor_key", "joint_tensor_value")


@pytest.fixture(autouse=True)
def _parted() -> Iterator[None]:
    """No degrees are in force after a test."""
    yield
    destroy_distributed_environment()


def configured(*flags: str):
    parser = xFuserArgs.add_cli_args(FlexibleArgumentParser(prog="script"))
    return xFuserArgs.from_cli_args(parser.parse_args(["--model", "somewhere", *flags])).create_config()


# -- starting ---------------------------------------------------------------------------------------------------------


def test_starting_by_all_of_xdits_keywords() -> None:
    init_distributed_environment(
        world_size=1, rank=0, distributed_init_method="env://", local_rank=0, backend=environment.backend_of(CPU)
    )
    assert (get_world_group().rank, get_world_group().local_rank, get_world_group().ranks) == (0, 0, (0,))
    initialize_model_parallel(
        data_parallel_degree=1,
        classifier_free_guidance_degree=1,
        sequence_parallel_degree=1,
        ulysses_degree=1,
        ring_degree=1,
        tensor_parallel_degree=1,
        pipeline_parallel_degree=1,
        vae_parallel_size=0,
        backend=None,
    )
    assert get_dit_group() is None and get_tensor_model_parallel_rank() == 0
    tensor = torch.ones(2)
    assert get_sp_group().all_gather(tensor) is tensor and get_sp_group().world_size == 1


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"backend": "mpi"}, "backend 'mpi'"),
        ({"local_rank": 3, "rank": 1}, "rank=1"),
        ({"world_size": 2}, "world_size=2"),
    ],
)
def test_starting_otherwise_than_it_was_started(keywords: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}[^\n]*$"):
        init_distributed_environment(**keywords)


def test_ranks_for_the_autoencoder_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="^vae_parallel_size=1 is not supported: [^\n]*--use_parallel_vae$"):
        initialize_model_parallel(vae_parallel_size=1)


def test_degrees_may_be_named_again_and_forgotten() -> None:
    configured("--verify_agreement")
    initialize_model_parallel(classifier_free_guidance_degree=1)  # the degrees of create_config(), not its settings
    with pytest.raises(ValueError, match="placed among"):
        initialize_model_parallel(ulysses_degree=2)
    destroy_model_parallel()
    assert not model_parallel_is_initialized() and get_world_group().world_size == 1
    with pytest.raises(RuntimeError, match=r"create_config\(\)"):
        get_sp_group()


# -- the runtime state ------------------------------------------------------------------------------------------------


def test_a_state_keeps_what_a_script_sets() -> None:
    engine_config, input_config = configured("--num_inference_steps", "7")
    pipeline = build_toy_flux()
    assert not runtime_state_is_initialized() and not get_runtime_state().is_ready()
    initialize_runtime_state(pipeline, engine_config)
    state = get_runtime_state()
    assert state is get_runtime_state() and runtime_state_is_initialized() and not state.is_ready()
    state.set_input_parameters(
        height=64, width=32, batch_size=2, num_inference_steps=7, seed=11, max_condition_sequence_length=512
    )
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    state.set_input_parameters(height=96, split_text_embed_in_sp=False)
    kept = state.input_config
    assert (kept.height, kept.width, kept.batch_size, kept.num_inference_steps) == (96, 32, 2, 7)
    assert state.is_ready() and not state.split_text_embed_in_sp
    state.split_text_embed_in_sp = True
    assert get_runtime_state().split_text_embed_in_sp
    assert state.parallel_config is engine_config.parallel_config and state.num_pipeline_patch == 1
    torch.manual_seed(11)
    np.random.seed(11)
    assert drawn == (random.Random(11).random(), np.random.rand(), torch.rand(1).item())
    state.destory_distributed_env()
    assert not runtime_state_is_initialized() and not model_parallel_is_initialized()
    assert input_config.num_inference_steps == 7


def test_a_state_says_what_it_does_not_have() -> None:
    configured()
    with pytest.raises(AttributeError, match=r"initialize_runtime_state\(pipeline, engine_config\)"):
        _ = get_runtime_state().parallel_config
    get_runtime_state().destory_distributed_env()
    with pytest.raises(RuntimeError, match=r"create_config\(\)"):
        get_runtime_state()


def test_heads_that_ulysses_does_not_divide() -> None:
    config = ParallelConfig(ulysses_degree=3)
    config.check_heads(6)
    with pytest.raises(ValueError, match="^--ulysses_degree 3 does not divide the model's 4 attention heads"):
        config.check_heads(4)


def test_degrees_by_kind() -> None:
    config = ParallelConfig(
        data_parallel_degree=2, use_cfg_parallel=True, pipefusion_parallel_degree=3, ring_degree=4, ulysses_degree=5
    )
    assert (config.dp_config.dp_degree, config.dp_config.cfg_degree, config.dp_config.use_cfg_parallel) == (2, 2, True)
    sequence = config.sp_config
    assert (sequence.sp_degree, sequence.ring_degree, sequence.ulysses_degree) == (20, 4, 5)
    stages = config.pp_config
    assert (stages.pp_degree, stages.num_pipeline_patch, stages.attn_layer_num_for_pp) == (3, 3, None)
    assert config.tp_config.tp_degree == config.tp_degree == 1


# -- versions ---------------------------------------------------------------------------------------------------------


def test_versions_of_diffusers() -> None:
    assert get_minimum_diffusers_version("flux") == get_minimum_diffusers_version() == MINIMUM
    assert has_valid_diffusers_version("flux") and has_valid_diffusers_version()
    assert get_minimum_diffusers_version("flux2") == "0.36.0"


def test_the_lowest_version_is_the_packages_own(request: pytest.FixtureRequest) -> None:
    setup = (request.config.rootpath / "setup.py").read_text()
    assert f'"diffusers>={MINIMUM.removesuffix(".0")}"' in setup


@pytest.mark.parametrize(("installed", "valid"), [("0.34.9", False), ("0.35.0rc1", True), ("1.0", True)])
def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch, installed: str, valid: bool) -> None:
    monkeypatch.setattr("xfuser.xdit.diffusers_versions.version", lambda package: installed)
    assert has_valid_diffusers_version("flux") is valid


# -- attention --------------------------------------------------------------------------------------------------------


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def test_attention_of_one_process() -> None:
    initialize_model_parallel()
    query, key, value = tensors(0)
    output = xFuserLongContextAttention()(None, query, key, value, causal=True)
    heads = [each.transpose(1, 2) for each in (query, key, value)]
    expected = scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("made", "called", "named"),
    [
        ({"use_kv_cache": True}, {}, "use_kv_cache"),
        ({"ring_impl_type": "basic_npu"}, {}, "ring_impl_type='basic_npu'"),
        ({}, {"joint_tensor_query": torch.ones(SHAPE)}, "given together"),
        (
            {},
            dict.fromkeys(("joint_tensor_query", "joint_tensor_key", "joint_tensor_value"), torch.ones(SHAPE)),
            "none",
        ),
        ({}, {"window_size": (4, 4)}, "window_size"),
        ({}, {"return_attn_probs": True}, "return_attn_probs"),
    ],
)
def test_attention_that_is_refused(made: dict[str, object], called: dict[str, object], named: str) -> None:
    initialize_model_parallel()
    with pytest.raises(ValueError, match=f"^[^\n]*{named}[^\n]*$"):
        xFuserLongContextAttention(**made)(None, *tensors(0), **called)
