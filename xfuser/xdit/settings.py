"""What scripts written for xDiT set, as this engine's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xfuser.config import CacheConfig
from xfuser.config.cache import base_method, settings_read_by
from xfuser.config.methods import with_threshold
from xfuser.xdit.configs import EngineConfig
from xfuser.xdit.parallel_state import model_parallel_is_initialized

_BUDGETS = ("adacorr_mode", "adacorr_tolerance", "adacorr_budget")  # three ways to say one thing

_REFUSED_LOADING = {
    "custom_pipeline": "no code is run that comes with a model; leave it out",
    "device_map": "each process holds its part on its own device; leave it out and call .to(device)",
    "quantization_config": "weights are not quantised here; leave it out",
    "return_org_pipeline": "load diffusers' pipeline with diffusers, and hand it to xDiTParallel",
}


def cache_settings_of(
    cache_args: Mapping[str, Any] | None, engine_config: EngineConfig, thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """The `CacheConfig` settings in force: those of the command line, then the script's, then the model's threshold.

    Args:
        cache_args: The script's: xDiT's ``use_teacache`` and ``use_fbcache``, or the names of `CacheConfig`.
        engine_config: Holds the command line's.
        thresholds: The model's ``rel_l1_thresh`` for each base method.

    Raises:
        TypeError: A name is not known.
        ValueError: A value is out of its range, or two settings contradict each other.
    """
    script, told = dict(cache_args or {}), engine_config.cache_settings
    chosen = {"Tea": script.pop("use_teacache", None), "Fb": script.pop("use_fbcache", None)}
    methods = [name for name, wanted in chosen.items() if wanted]
    if script.get("use_cache") is not None:
        methods.append(script["use_cache"])
    if len(set(methods)) > 1:
        raise ValueError(f"cache_args name two base methods, {' and '.join(methods)}; choose one")
    if methods:
        script["use_cache"] = methods[0]
    if methods and told.get("use_cache", methods[0]) != methods[0]:
        # They were chosen for the method that the command line has put another one in place of.
        for name in ("rel_l1_thresh", *(each.name for each in settings_read_by(methods[0]))):
            script.pop(name, None)
    if any(name in told for name in _BUDGETS):
        for name in _BUDGETS:
            script.pop(name, None)
    settings = script | told
    method = base_method(settings.get("use_cache"))
    if method not in with_threshold() and "rel_l1_thresh" not in told:
        settings.pop("rel_l1_thresh", None)  # xDiT's scripts name one whether they cache or not
    if method in thresholds and settings.get("rel_l1_thresh") is None:
        settings["rel_l1_thresh"] = thresholds[method]
    CacheConfig.from_keywords(**settings)
    return settings


def check_loading(keywords: Mapping[str, Any]) -> None:
    """Refuse what ``from_pretrained`` was asked for and this engine does not do (ValueError)."""
    for name, instead in _REFUSED_LOADING.items():
        if keywords.get(name):
            raise ValueError(f"from_pretrained({name}=...) is not supported: {instead}")
    if not keywords.get("use_safetensors", True):
        raise ValueError(
            "from_pretrained(use_safetensors=False) is not supported: other files can run code; save the model with "
            "save_pretrained(folder, safe_serialization=True)"
        )


def check_runtime(engine_config: EngineConfig) -> None:
    """Refuse what a script has changed after ``create_config`` settled it, or leaves to Ray (ValueError)."""
    runtime, parallel = engine_config.runtime_config, engine_config.parallel_config
    if runtime.use_ray and not model_parallel_is_initialized():
        raise ValueError(
            "--use_ray: load the pipeline with xfuser.ray.pipeline.pipeline_utils.RayDiffusionPipeline, or leave it out"
        )
    for name in ("warmup_steps", "use_parallel_vae"):
        if getattr(runtime, name) != getattr(parallel, name):
            raise ValueError(
                f"runtime_config.{name}={getattr(runtime, name)}: create_config() settled it; set it in xFuserArgs, or "
                f"give --{name}"
            )
