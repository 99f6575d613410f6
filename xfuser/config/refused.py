"""Flags of upstream's scripts that this engine does not have, and what to use in their place."""

from __future__ import annotations

from collections.abc import Sequence

_SPREAD = "spread the weights with --pipefusion_parallel_degree"
_PRECISION = "weights run in bfloat16 on a GPU and in float32 on a CPU"
_HYBRID = "name --use_cfg_parallel, --ulysses_degree, --ring_degree and --pipefusion_parallel_degree yourself"

REFUSED = {
    "--tensor_parallel_degree": f"tensor parallelism is not supported; {_SPREAD}, or --ulysses_degree for speed",
    "--fully_shard_degree": f"sharded weights are not supported; {_SPREAD}",
    "--fully_shard": f"sharded weights are not supported; {_SPREAD}",
    "--use_fsdp": f"sharded weights are not supported; {_SPREAD}",
    "--use_fp8_t5_encoder": f"8-bit text encoders are not supported; leave it out ({_PRECISION})",
    "--use_fp8_gemms": f"8-bit weights are not supported; leave it out ({_PRECISION})",
    "--use_fp4_gemms": f"4-bit weights are not supported; leave it out ({_PRECISION})",
    "--use_int8": f"8-bit weights are not supported; leave it out ({_PRECISION})",
    "--quantization": f"quantised weights are not supported; leave it out ({_PRECISION})",
    "--quantize": f"quantised weights are not supported; leave it out ({_PRECISION})",
    "--quantize_transformer": f"quantised weights are not supported; leave it out ({_PRECISION})",
    "--use_hybrid_attn_schedule": f"mixed attention schedules are not supported; {_HYBRID}",
    "--use_hybrid_fp8_attn": f"mixed attention schedules are not supported; {_HYBRID}",
    "--use_hybrid_parallel": f"degrees are not chosen for you; {_HYBRID}",
    "--enable_model_cpu_offload": f"offloading is not supported; {_SPREAD}, or --enable_tiling and --enable_slicing",
    "--enable_sequential_cpu_offload": f"offloading is not supported; {_SPREAD}",
    "--use_ray": "Ray is not supported by this command; start it with torchrun, which works on several hosts too",
    "--ray_world_size": "Ray is not supported by this command; use torchrun's --nnodes and --nproc_per_node",
    "--use_onediff": "OneDiff is not supported; use --use_torch_compile",
}
PREFIXES = {
    "--quantiz": f"quantised weights are not supported; leave it out ({_PRECISION})",
    "--use_hybrid_": f"mixed schedules are not supported; {_HYBRID}",
}


def refuse_unsupported(arguments: Sequence[str]) -> None:
    """Name the first unsupported flag of upstream's on a command line, and what to use instead (ValueError)."""
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        reason = REFUSED.get(flag)
        if reason is None:
            reason = next((text for prefix, text in PREFIXES.items() if flag.startswith(prefix)), None)
        if reason is not None:
            raise ValueError(f"{flag}: {reason}")
