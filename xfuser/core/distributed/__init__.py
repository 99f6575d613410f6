"""The process, its devices, and what the ranks that share an image tell each other."""

from xfuser.lazy import lazy_attributes

_STATE = "xfuser.xdit.parallel_state"
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
) | dict.fromkeys(
    ("get_runtime_state", "initialize_runtime_state", "runtime_state_is_initialized"),
    "xfuser.xdit.runtime_state",
)

__all__ = [*_PUBLIC]

# Looked up on first use: these modules import torch.
__getattr__ = lazy_attributes(__name__, _PUBLIC)
