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
_RAY = "processes are started by torchrun; use --nproc_per_node"
_OFFLOAD = "weights stay on the device; use --pipefusion_parallel_degree to hold fewer of them"
_ATTENTION = "attention is not compressed here; use --use_cache"
_COMPILED = "use --use_torch_compile"
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
    use_ray: bool = _refused(False, _RAY)
    ray_world_size: int = _refused(1, _RAY)
    dit_parallel_size: int = _refused(0, "all processes run the transformer; leave it out")
    vae_parallel_size: int = _refused(0, "the ranks that share an image decode it; use --use_parallel_vae")
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
    trust_remote_code: bool = _refused(False, "no code is run that comes with a model; leave it out")

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


# Flags of xDiT's newer commands, for a command line that never had the others' meaningless values.
FURTHER = {
    "fully_shard": _STAGES,
    "use_int8": _QUANTISED,
    "quantization": _QUANTISED,
    "quantize": _QUANTISED,
    "quantize_transformer": _QUANTISED,
}
PREFIXES = {
    "quantiz": _QUANTISED,
    "use_hybrid_": "name --use_cfg_parallel, --ulysses_degree, --ring_degree and --pipefusion_parallel_degree yourself",
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
