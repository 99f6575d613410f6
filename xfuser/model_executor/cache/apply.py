"""The two ways to switch caching on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.config.cache import FIRST, base_method
from xfuser.config.trajectory import AUTO, TrajectoryConfig
from xfuser.model_executor.adapters import denoisers_of, spec_of
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import is_trajectory
from xfuser.model_executor.cache.adacorrection.trajectory.engine import TrajectoryEngine, attach_trajectory
from xfuser.model_executor.cache.blocks.counting import BaseCounter
from xfuser.model_executor.cache.blocks.parts import check_model
from xfuser.model_executor.cache.calibration.store import Calibration
from xfuser.model_executor.cache.engine import CacheEngine
from xfuser.model_executor.cache.foreign import check_no_other_cache, check_not_compiled_whole
from xfuser.model_executor.cache.patching import check_scheduler_free, check_transformer_free
from xfuser.model_executor.cache.policies import POLICIES

logger = logging.getLogger(__name__)

ONLY_TRAJECTORY = sorted(set(TrajectoryConfig.__dataclass_fields__) - {"adacorr_budget", "calibration"})


def apply_cache_on_transformer(
    transformer: nn.Module, use_cache: str | CacheConfig | None = None, **settings: Any
) -> CacheEngine:
    """Attach a cache method, and AdaCorrection if asked for, to a diffusers transformer.

    Generations, steps and conditioning branches are inferred from the timesteps. Where a pipeline is at hand,
    `apply_cache_on_pipeline` knows them instead.

    Args:
        transformer: ``pipeline.transformer`` of a supported diffusers pipeline.
        use_cache: The name of the base method, ``None`` for none; or a whole `CacheConfig`, and no other settings.
        **settings: The other fields of `CacheConfig`.

    Returns:
        The attached engine: ``summary()``, ``reset()``, ``remove()``.

    Raises:
        TypeError: Unknown setting, or a transformer that is not supported.
        ValueError: A value out of its range, or an engine is attached already. Nothing has been changed then.
    """
    use_cache, settings = as_keywords(use_cache, settings)
    config = CacheConfig.from_keywords(use_cache=use_cache, **settings)
    return _attach([transformer], config, None)


def apply_cache_on_pipeline(
    pipeline: Any, use_cache: str | CacheConfig | None = None, **settings: Any
) -> CacheEngine | TrajectoryEngine:
    """Attach a cache to a diffusers pipeline; its scheduler marks generations and steps.

    Without a base method, and with one of ``target_speedup``, ``min_psnr`` and ``adacorr_budget``, AdaCorrection works
    on the trajectory: for any pipeline with a denoiser and a scheduler; settings as in `TrajectoryConfig`. With a base
    method, ``enable_adacorrection=True`` and a calibration of the trajectory (a file, or ``"auto"``), what the base
    method would have spent, counted in the first call, is spent there. Otherwise arguments, result and errors are those
    of `apply_cache_on_transformer`.

    Example:
        >>> engine = apply_cache_on_pipeline(pipeline, target_speedup=3)
    """
    use_cache, settings = as_keywords(use_cache, settings)
    if spends_as_base(use_cache, settings):
        return attach_as_base(pipeline, use_cache, **settings)
    if on_trajectory(use_cache, settings):
        settings.pop("enable_adacorrection", None)
        return attach_trajectory(pipeline, **settings)
    config = CacheConfig.from_keywords(use_cache=use_cache, **settings)
    return _attach(denoisers_of(pipeline), config, pipeline)


def as_keywords(use_cache: str | CacheConfig | None, settings: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Take a whole `CacheConfig` in the place of the base method's name for the settings in it.

    Raises:
        TypeError: Other settings are named beside it.
    """
    if not isinstance(use_cache, CacheConfig):
        return use_cache, settings
    if settings:
        raise TypeError(f"{next(iter(settings))} is named beside a CacheConfig; put it into that")
    named = {each.name: getattr(use_cache, each.name) for each in fields(use_cache)}
    changed = {each.name: named[each.name] for each in fields(use_cache) if named[each.name] != each.default}
    return changed.pop("use_cache", None), changed


def on_trajectory(use_cache: str | None, settings: dict[str, Any]) -> bool:
    """Tell whether settings ask for the trajectory.

    They do where they name ``target_speedup`` or ``min_psnr``, or ``adacorr_budget`` with no base method and without
    ``enable_adacorrection=True``, which means the blocks; or any other setting that only the trajectory has.

    Raises:
        ValueError: A base method and a setting that it cannot have are both named.
    """
    use_cache = base_method(use_cache)
    only_there = [name for name in ONLY_TRAJECTORY if settings.get(name) is not None]
    only_there += ["calibration='auto'"] if settings.get("calibration") == AUTO else []
    if only_there and use_cache is not None:
        raise ValueError(f"{only_there[0]} belongs to AdaCorrection on the trajectory; leave use_cache out")
    if only_there:
        return True
    return use_cache is None and settings.get("adacorr_budget") is not None and not _names_blocks(settings)


def spends_as_base(use_cache: str | None, settings: dict[str, Any]) -> bool:
    """Tell whether a base method is named whose compute the trajectory is to spend: one with such a calibration.

    Raises:
        ValueError: A setting is named that says otherwise.
    """
    calibration = settings.get("calibration")
    there = calibration == AUTO or (
        isinstance(calibration, (str, PathLike)) and Path(calibration).is_file() and is_trajectory(Path(calibration))
    )
    if base_method(use_cache) is None or not settings.get("enable_adacorrection") or not there:
        return False
    for name in ("adacorr_budget", "target_speedup", "min_psnr", "adacorr_mode"):
        if settings.get(name) is not None:
            raise ValueError(
                f"{name} with use_cache={use_cache!r} and a calibration of the trajectory: the base method says what "
                f"is spent there; leave one of them out"
            )
    return True


def attach_as_base(pipeline: Any, use_cache: str | None, **settings: Any) -> TrajectoryEngine:
    """Attach what `spends_as_base` tells of; arguments and errors as for `apply_cache_on_pipeline`."""
    above = {name: settings.pop(name) for name in (*ONLY_TRAJECTORY, "calibration") if name in settings}
    config = CacheConfig.from_keywords(use_cache=use_cache, **settings)
    for denoiser in denoisers_of(pipeline):
        check_unattached(denoiser, getattr(pipeline, "scheduler", None))
    return attach_trajectory(pipeline, counter=BaseCounter(pipeline, config), **above)


def _names_blocks(settings: dict[str, Any]) -> bool:
    return bool(settings.get("enable_adacorrection")) or settings.get("adacorr_mode") is not None


def _attach(transformers: Sequence[Any], config: CacheConfig, pipeline: Any) -> CacheEngine:
    scheduler = getattr(pipeline, "scheduler", None)
    first, *others = transformers
    spec = spec_of(first)
    spec.check_return_order(config.return_hidden_states_first)
    for transformer in transformers:
        check_unattached(transformer, scheduler)
    check_model(transformers, spec, config)
    calibration = load_calibration(first, config, scheduler)
    engine = CacheEngine(first, spec, config, calibration=calibration, others=others)
    if pipeline is not None:
        engine.follow_pipeline(pipeline)
    return engine


def cache_engine_of(transformer: nn.Module) -> CacheEngine:
    """Find the engine that is attached to a transformer, whoever attached it.

    Example:
        >>> pipeline.transformer = apply_cache_on_transformer(pipeline.transformer, use_cache="Fb")  # xDiT's path
        >>> cache_engine_of(pipeline.transformer).summary()

    Raises:
        ValueError: There is none.
    """
    forward = vars(transformer).get("forward")
    while forward is not None:
        if isinstance(engine := getattr(forward, "cache_engine", None), CacheEngine):
            return engine
        forward = getattr(forward, "__wrapped__", None)
    raise ValueError(f"this {type(transformer).__name__} has no cache attached; call apply_cache_on_transformer first")


def replace_cache_on_transformer(transformer: nn.Module, config: CacheConfig) -> CacheEngine:
    """Attach an engine in place of the one that is attached, if any, with a logged line.

    Raises:
        TypeError: The transformer is not supported.
        ValueError: A setting does not fit it, or something other than one engine has a hold on it. Nothing has been
            changed then.
    """
    forward = vars(transformer).get("forward") if isinstance(transformer, nn.Module) else None
    before = getattr(forward, "cache_engine", None)
    if before is None:
        return _attach([transformer], config, None)
    spec_of(transformer).check_return_order(config.return_hidden_states_first)
    load_calibration(transformer, config, None)
    before.remove()
    logger.warning("the cache %r on this %s is replaced", before.config.use_cache, type(transformer).__name__)
    return _attach([transformer], config, None)


def check_unattached(transformer: nn.Module, scheduler: Any) -> None:
    """Refuse what something else has a hold on (ValueError).

    That is an engine, one of diffusers' own caches, or a compiler that has made one graph of the whole transformer.
    """
    check_not_compiled_whole(transformer)
    check_transformer_free(transformer)
    check_no_other_cache(transformer)
    if scheduler is not None:
        check_scheduler_free(scheduler)


def load_calibration(transformer: nn.Module, config: CacheConfig, scheduler: Any) -> Calibration | None:
    """The calibration that the settings name, if it fits.

    Raises:
        ValueError: It does not, or cannot be read.
    """
    if config.calibration is not None and scheduler is None and config.num_steps is None:
        raise ValueError("calibration: the number of steps is unknown; set num_steps, or use apply_cache_on_pipeline")
    if config.calibration in (None, FIRST):
        return None
    calibration = Calibration.load(Path(config.calibration))
    calibration.check(transformer, spec_of(transformer).blocks(transformer), scheduler)
    if config.use_cache is not None and POLICIES[config.use_cache].needs_calibration:
        if config.use_cache not in calibration.sections:
            raise ValueError(
                f"calibration={str(config.calibration)!r} has nothing for use_cache={config.use_cache!r}; run `xdit "
                "calibrate` again"
            )
    if config.num_steps is not None:
        calibration.check_steps(config.num_steps)
    return calibration
