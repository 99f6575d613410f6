"""Which of xDiT's names are found where, and what to use instead of those that are not carried over.

A name is a dotted path. What stands for a module stands for everything inside it. Names from xDiT 0.3 to its present,
and from the FastCache and AdaCorrection authors' scripts.
"""

from __future__ import annotations

# -- pipelines: a script imports many and uses one, so that the others refuse when they are used -----------------------

_UPSTREAM = "xfuser.xdit.pipelines"
WRAPPED = (
    "xFuserFluxPipeline",
    "xFuserHunyuanDiTPipeline",
    "xFuserPixArtAlphaPipeline",
    "xFuserPixArtSigmaPipeline",
    "xFuserStableDiffusion3Pipeline",
)
OTHER_MODELS = (
    "FLUX, HunyuanDiT, PixArt and Stable Diffusion 3 are; give another diffusers pipeline to xfuser.parallelize, or "
    "use xDiT itself"
)
_CACHE_WRAPPER = "use xfuser.apply_cache_on_pipeline(pipeline, use_cache='Fast')"

REFUSING_PIPELINES = dict.fromkeys(
    (
        "xFuserChromaPipeline",
        "xFuserCogVideoXImageToVideoPipeline",
        "xFuserCogVideoXPipeline",
        "xFuserConsisIDPipeline",
        "xFuserFlux2KleinPipeline",
        "xFuserFlux2Pipeline",
        "xFuserFluxControlPipeline",
        "xFuserFluxKontextPipeline",
        "xFuserLattePipeline",
        "xFuserLumina2Pipeline",
        "xFuserPipelineFluxControlPipeline",
        "xFuserQwenImageEditPipeline",
        "xFuserQwenImagePipeline",
        "xFuserSanaPipeline",
        "xFuserSanaSprintPipeline",
        "xFuserStableDiffusionXLPipeline",
        "xFuserWanImageToVideoPipeline",
        "xFuserWanPipeline",
        "xFuserWanTI2VPipeFusionPipeline",
        "xFuserZImagePipeline",
    ),
    OTHER_MODELS,
) | {"xFuserFastCachePipelineWrapper": _CACHE_WRAPPER}

_PIPELINES = "xfuser.model_executor.pipelines"
_OWN_MODULES = {
    "pipeline_flux": "xFuserFluxPipeline",
    "pipeline_hunyuandit": "xFuserHunyuanDiTPipeline",
    "pipeline_pixart_alpha": "xFuserPixArtAlphaPipeline",
    "pipeline_pixart_sigma": "xFuserPixArtSigmaPipeline",
    "pipeline_stable_diffusion_3": "xFuserStableDiffusion3Pipeline",
}
_REFUSING_MODULES = tuple(
    f"{_PIPELINES}.{name}"
    for name in (
        "fastcache_pipeline",
        "pipeline_chroma",
        "pipeline_cogvideox",
        "pipeline_cogvideox_image2video",
        "pipeline_consisid",
        "pipeline_flux2",
        "pipeline_flux2_klein",
        "pipeline_flux_control",
        "pipeline_latte",
        "pipeline_lumina2",
        "pipeline_qwen_image",
        "pipeline_qwen_image_edit",
        "pipeline_sana",
        "pipeline_sana_sprint",
        "pipeline_stable_diffusion_xl",
        "pipeline_wan",
        "pipeline_wan_i2v",
        "pipeline_wan_pipefusion",
        "pipeline_z_image",
        "pipeline_zimage",
    )
)
PIPELINE_MODULES = ("xfuser", _PIPELINES, *_REFUSING_MODULES)

# -- modules of xDiT that have no file here: where their names live ---------------------------------------------------

_ATTENTION = {"xFuserLongContextAttention": "xfuser.xdit.long_context_attention"}
MODULES: dict[str, dict[str, str] | str] = {  # each name's own place, or one that has them all
    "xfuser.config.args": "xfuser.xdit.args",
    "xfuser.config.config": "xfuser.xdit.configs",
    "xfuser.config.diffusers": dict.fromkeys(
        ("get_minimum_diffusers_version", "has_valid_diffusers_version"), "xfuser.xdit.diffusers_versions"
    ),
    "xfuser.core.long_ctx_attention": _ATTENTION,
    "xfuser.core.long_ctx_attention.hybrid": _ATTENTION,
    "xfuser.core.long_ctx_attention.hybrid.attn_layer": _ATTENTION,
    "xfuser.core.distributed.parallel_state": "xfuser.xdit.parallel_state",
    "xfuser.core.distributed.runtime_state": "xfuser.xdit.runtime_state",
    "xfuser.logger": {"init_logger": "xfuser.xdit.logger"},
    "xfuser.parallel": {"xDiTParallel": _UPSTREAM},
    **{f"{_PIPELINES}.{module}": {name: _UPSTREAM} for module, name in _OWN_MODULES.items()},
    **{module: {} for module in _REFUSING_MODULES},
}

# -- what is not carried over -----------------------------------------------------------------------------------------

_PARALLELIZE = (
    "xfuser.parallelize(pipeline, mesh) spreads an untouched diffusers pipeline, whose modules and attention "
    "processors stay its own"
)
_APPLY = "use xfuser.apply_cache_on_pipeline or xfuser.apply_cache_on_transformer"
_COMMAND = "use the xdit command, or xfuser.load_pipeline with xfuser.parallelize"
_RAY = "use xfuser.ray.pipeline.pipeline_utils.RayDiffusionPipeline, or torchrun with --nproc_per_node"
_KERNELS = "the attention kernel follows from the device; torch's own is used, or flash-attn where it is installed"
_COMPRESSED = "attention is not compressed here; use --use_cache"
_QUANTISED = "weights are not quantised here"
_DEGREES = "ParallelConfig holds every degree"
_TENSOR = "there is no tensor parallelism; use ulysses_degree or pipefusion_parallel_degree"
_VAE = "the ranks that share an image decode it; use --use_parallel_vae"
_SHARDED = "weights are not sharded; PipeFusion's stages hold only their own, use --pipefusion_parallel_degree"
_GROUPS = "initialize_model_parallel() makes every group; get_sp_group() and its siblings return them"

_NAMES_OF_CONFIG = {
    "DataParallelConfig": _DEGREES,
    "FastAttnConfig": _COMPRESSED,
    "FullyShardConfig": _SHARDED,
    "PipeFusionParallelConfig": _DEGREES,
    "SequenceParallelConfig": _DEGREES,
    "TensorParallelConfig": _TENSOR,
}
_NAMES_OF_STATE = {
    "GroupCoordinator": _GROUPS,
    "PipelineGroupCoordinator": _GROUPS,
    "SequenceParallelGroupCoordinator": _GROUPS,
    "get_fs_group": _SHARDED,
    "get_tp_group": _TENSOR,
    "get_vae_parallel_group": _VAE,
    "get_vae_parallel_rank": _VAE,
    "get_vae_parallel_world_size": _VAE,
    "init_dit_group": _GROUPS,
    "init_model_parallel_group": _GROUPS,
    "init_vae_group": _VAE,
    "init_world_group": _GROUPS,
    "shard_component": _SHARDED,
}

NOT_CARRIED_OVER: dict[str, str] = {
    "xfuser.compat": "diffusers' own names are imported from diffusers",
    "xfuser.compile": "use --use_torch_compile, or xfuser.parallelize(pipeline, mesh, use_torch_compile=True)",
    "xfuser.config.attention_a2a": _KERNELS,
    "xfuser.config.gemm": _QUANTISED,
    "xfuser.core.cache_manager": "PipeFusion remembers keys and values itself; use xfuser.parallelize(pipeline, mesh)",
    "xfuser.core.distributed.fp4_quantize": _QUANTISED,
    "xfuser.core.distributed.fp8_comms": _QUANTISED,
    "xfuser.core.distributed.group_coordinator": _GROUPS,
    "xfuser.core.distributed.sharding": _SHARDED,
    "xfuser.core.distributed.ssta": _COMPRESSED,
    "xfuser.core.distributed.ssta_attention": _COMPRESSED,
    "xfuser.core.distributed.utils": _GROUPS,
    "xfuser.core.fast_attention": _COMPRESSED,
    "xfuser.core.long_ctx_attention.ring": "use xfuser.core.long_ctx_attention.xFuserLongContextAttention, or yunchang",
    "xfuser.core.long_ctx_attention.ulysses": (
        "use xfuser.core.long_ctx_attention.xFuserLongContextAttention, or yunchang"
    ),
    "xfuser.core.utils": _COMMAND,
    "xfuser.envs": (
        "ask importlib.metadata for a package's version and torch for a device; "
        "xfuser.core.distributed.environment.describe_environment(device) tells both"
    ),
    "xfuser.executor": _RAY,
    "xfuser.model_executor.accelerator": _CACHE_WRAPPER,
    "xfuser.model_executor.base_wrapper": _PARALLELIZE,
    "xfuser.model_executor.cache.adapters": _APPLY,
    "xfuser.model_executor.cache.beaver3D": _APPLY,
    "xfuser.model_executor.cache.diffusers_adapters.flux2": OTHER_MODELS,
    "xfuser.model_executor.cache.diffusers_adapters.registry": _APPLY,
    "xfuser.model_executor.cache.diffusers_adapters.z_image": OTHER_MODELS,
    "xfuser.model_executor.cache.presets": "xfuser.CacheConfig holds every setting",
    "xfuser.model_executor.cache.teacache": _APPLY,
    "xfuser.model_executor.cache.utils": _APPLY,
    "xfuser.model_executor.layers": _PARALLELIZE,
    "xfuser.model_executor.models": _PARALLELIZE,
    "xfuser.model_executor.pipelines.base_pipeline": "xfuser.parallelize(pipeline, mesh) takes any of diffusers'",
    "xfuser.model_executor.pipelines.dit_pipeline": "xfuser.parallelize(pipeline, mesh) takes any of diffusers'",
    "xfuser.model_executor.pipelines.register": "xfuser.xDiTParallel(pipeline, engine_config, input_config) chooses",
    "xfuser.model_executor.quant": _QUANTISED,
    "xfuser.model_executor.schedulers": "diffusers' own schedulers are used",
    "xfuser.ray": _RAY,
    "xfuser.runner": _COMMAND,
    "xfuser.worker": _RAY,
    **{f"xfuser.core.distributed.attention_{name}": _KERNELS for name in ("backend", "schedule")},
    **{
        f"xfuser.core.attention.{name}": _KERNELS
        for name in (
            "backends",
            "constraints",
            "hadamard",
            "layout",
            "numerics",
            "registry",
            "requirements",
            "sparsity",
            "spec",
        )
    },
    **{
        f"{module}.{name}": reason
        for module in ("xfuser.config", "xfuser.config.config")
        for name, reason in _NAMES_OF_CONFIG.items()
    },
    **{
        f"{module}.{name}": reason
        for module in ("xfuser.core.distributed", "xfuser.core.distributed.parallel_state")
        for name, reason in _NAMES_OF_STATE.items()
    },
}
