"""Flags of xDiT that this engine does not have: known by name, so that they are refused and not misread."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any


def _refused(default: Any, instead: str) -> Any:
    return field(default=default, metadata={"instead": instead})


_SPLIT = "use --ulysses_degree, --ring_degree or --pipefusion_parallel_degree"
_STAGES = "PipeFusion's stages hold only their own weights; use --pipefusion_parallel_degree"
_QUANTISED = "weights are not quantised here; leave it out"
_RAY = "processes are started by torchrun here; scripts start them with Ray through RayDiffusionPipeline"
_OFFLOAD = "weights stay on the device; use --pipefusion_parallel_degree to hold fewer of them"
_ATTENTION = "attention is not compressed here; use --use_cache"
_COMPILED = "use --use_torch_compile"
_SCHEDULED = "precision and attention are the same at every step; leave it out"
_TIMED = "every image is made once; time methods with benchmark/cache_execute.py"
_HOSTS = "for several hosts, start torchrun on each of them with scripts/generate.py"
_IMAGES = "this engine generates images from text; leave it out"


@dataclass
class RefusedArguments:
    """The refused flags at the values that mean nothing; any other value is a ValueError."""

    tensor_parallel_degree: int = _refused(1, _SPLIT)
    split_scheme: str = _refused("row", _SPLIT)
    fully_shard_degree: int = _refused(1, _STAGES)
    use_fsdp: bool = _refused(False, _STAGES)
    shard_dit: bool = _refused(False, _STAGES)
    shard_t5_encoder: bool = _refused(False, "every rank holds the text encoders; leave it out")
    use_fp8_t5_encoder: bool = _refused(False, _QUANTISED)
    use_fp8_gemms: bool = _refused(False, _QUANTISED)
    use_int8_gemms: bool = _refused(False, _QUANTISED)
    use_fp4_gemms: bool = _refused(False, _QUANTISED)
    use_onediff: bool = _refused(False, _COMPILED)
    attention_backend: str | None = _refused(None, "it follows from the device; leave it out")
    enable_sequential_cpu_offload: bool = _refused(False, _OFFLOAD)
    enable_model_cpu_offload: bool = _refused(False, _OFFLOAD)
    use_fast_attn: bool = _refused(False, _ATTENTION)
    n_calib: int | None = _refused(None, _ATTENTION)
    threshold: float | None = _refused(None, _ATTENTION)
    window_size: int | None = _refused(None, _ATTENTION)
    coco_path: str | None = _refused(None, _ATTENTION)
    num_frames: int | None = _refused(None, _IMAGES)
    img_file_path: str | None = _refused(None, _IMAGES)
    wan_teacache_thresh: float | None = _refused(None, _IMAGES)
    wan_teacache_use_ret_steps: bool = _refused(False, _IMAGES)

    def check_refused(self) -> None:
        """Raise ValueError for the first flag that has another value than the one that means nothing."""
        for each in fields(RefusedArguments):
            value = getattr(self, each.name)
            if value != each.default:
                named = f"--{each.name}" if value is True else f"--{each.name} {value}"
                raise ValueError(f"{named} is not supported: {each.metadata['instead']}")


class _Refusal(argparse.Action):
    """Takes the value that means nothing, and stops at any other."""

    def __init__(self, option_strings: Sequence[str], dest: str, instead: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, **settings)
        self._instead = instead

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.nargs == 0 or str(values) != str(self.default):
            raise argparse.ArgumentError(self, f"not supported: {self._instead}")


def add_refused_arguments(parser: argparse.ArgumentParser) -> None:
    """Let the refused flags be told apart from misspelt ones. They are not in the help."""
    for each in fields(RefusedArguments):
        parser.add_argument(
            f"--{each.name}",
            action=_Refusal,
            nargs=0 if each.default is False else None,
            default=each.default,
            help=argparse.SUPPRESS,
            instead=each.metadata["instead"],
        )


# Flags of xDiT's newer commands, of its runner, and those that only its scripts have.
FURTHER = {
    "use_ray": _RAY,
    "ray_world_size": _RAY,
    "dit_parallel_size": "all processes run the transformer; leave it out",
    "vae_parallel_size": "the ranks that share an image decode it; use --use_parallel_vae",
    "trust_remote_code": "no code is run that comes with a model; leave it out",
    "fully_shard": _STAGES,
    "use_int8": _QUANTISED,
    "quantization": _QUANTISED,
    "quantize": _QUANTISED,
    "quantize_transformer": _QUANTISED,
    "cross_attention_backend": "it follows from the device; leave it out",
    "dataset_path": "use --prompt; `xdit calibrate` takes --prompts FILE",
    "download_dir": "downloads are kept where HF_HOME says; set it",
    "flow_shift": "the model's own scheduler settings are used; leave it out",
    "guidance_scale_2": "no model here has a second scale; use --guidance_scale",
    "input_images": _IMAGES,
    "resize_input_images": _IMAGES,
    "task": _IMAGES,
    "memory_efficient_sharding": _STAGES,
    "no_reshard_after_forward": _STAGES,
    "num_iterations": _TIMED,
    "repetition_sleep_duration": _TIMED,
    "warmup_calls": _TIMED,
    "profile": _TIMED,
    "no_use_resolution_binning": "sizes are the pipeline's business; leave it out",
    "use_vae_channels_last_format": "use --enable_tiling, --enable_slicing or --use_parallel_vae, or leave it out",
    "nproc_per_node": "the degrees multiply to the number of processes; leave it out",
}
PREFIXES = {
    "quantiz": _QUANTISED,
    "use_hybrid_": _SCHEDULED,
    "hybrid_": _SCHEDULED,
    "num_hybrid_": _SCHEDULED,
    "fp8_precision_": _QUANTISED,
    "profile_": _TIMED,
    "use_ssta_": _ATTENTION,
    "spargeattn_": _ATTENTION,
    "use_spargeattn_": _ATTENTION,
    "no_spargeattn_": _ATTENTION,
    "no_use_spargeattn_": _ATTENTION,
    "vsa_": _ATTENTION,
    "use_vsa_": _ATTENTION,
    "no_vsa_": _ATTENTION,
    "no_use_vsa_": _ATTENTION,
    "distilled_": "name the folder of the whole pipeline with --model",
    "lora_": "load it with pipeline.load_lora_weights() in Python; the cache goes with it",
    "nnodes": _HOSTS,
    "node_rank": _HOSTS,
    "master_": _HOSTS,
}


def refuse_unsupported(arguments: Sequence[str]) -> None:
    """Name the first flag of xDiT on a command line that is not supported, and what to use instead (ValueError)."""
    reasons = {each.name: each.metadata["instead"] for each in fields(RefusedArguments)} | FURTHER
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            continue
        reason = reasons.get(name) or next((text for each, text in PREFIXES.items() if name.startswith(each)), None)
        if reason is not None:
            raise ValueError(f"{flag} is not supported: {reason}")
