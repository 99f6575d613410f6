"""The process, its devices, and what the ranks that share an image tell each other."""

from xfuser.names import looked_up

_STATE = "xfuser.core.distributed.parallel_state"
_PUBLIC = dict.fromkeys(
    (
        "get_classifier_free_guidance_rank",
        "get_classifier_free_guidance_world_size",
        "get_cfg_group",
        "get_data_parallel_rank",
        "get_data_parallel_world_size",
        "get_dit_group",
        "get_dit_world_size",
        "get_dp_group",
        "get_pipeline_parallel_rank",
        "get_pipeline_parallel_world_size",
        "get_pp_group",
        "get_ring_parallel_rank",
        "get_ring_parallel_world_size",
        "get_sequence_parallel_rank",
        "get_sequence_parallel_world_size",
        "get_sp_group",
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size",
        "get_ulysses_parallel_rank",
        "get_ulysses_parallel_world_size",
        "get_world_group",
        "init_distributed_environment",
        "initialize_model_parallel",
        "is_dp_last_group",
        "is_pipeline_first_stage",
        "is_pipeline_last_stage",
        "model_parallel_is_initialized",
    ),
    _STATE,
) | {"get_runtime_state": "xfuser.core.distributed.runtime_state"}

_GROUP = "take torch's group from xfuser.ParallelMesh, with group(dimension), or its sequence, peers and control"
_TENSOR = "there is no tensor parallelism; its world size is always 1"
_VAE = "the ranks that share an image decode it; use --use_parallel_vae"
_RUNTIME = "xfuser.parallelize(pipeline, mesh) attaches everything that a pipeline needs"
_NOT_CARRIED_OVER = {
    "get_tp_group": _TENSOR,
    "get_vae_parallel_group": _VAE,
    "get_vae_parallel_rank": _VAE,
    "get_vae_parallel_world_size": _VAE,
    "init_dit_group": _GROUP,
    "init_model_parallel_group": _GROUP,
    "init_vae_group": _VAE,
    "initialize_runtime_state": _RUNTIME,
    "runtime_state_is_initialized": "model_parallel_is_initialized() tells whether create_config() was called",
}

__all__ = [*_PUBLIC]

# Looked up on first use: these modules import torch.
__getattr__ = looked_up(__name__, _PUBLIC, _NOT_CARRIED_OVER)
