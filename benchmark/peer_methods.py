"""The rows of the comparison with other projects: how each method is put on a fresh tiny-dit pipeline."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import nn

from benchmark.peer_mean_velocity import mean_velocity_peers as _mean_velocity
from benchmark.peer_tools import (
    Attached,
    Forecaster,
    Peer,
    Polynomial,
    StepCache,
    Subject,
    Weighted,
    environment,
    evenly,
    fit_descent,
    fit_least_squares,
    plain,
    record_outputs,
)
from xfuser.model_executor.cache import apply_cache_on_pipeline
from xfuser.model_executor.pipelines import LoadedPipeline

UNCACHED = "no cache"
BUDGETS = (0.38, 0.30, 0.22)
RESIDUALS = (0.05, 0.1, 0.2, 0.35)
# The steps that L2P's authors evaluate of 50 at their interval 5 (the FULL_STEP_SCHEDULES of github.com/Aredstone/
# L2P-Cache); they publish none for more steps, where the evenly spaced ones are taken.
L2P_STEPS = {11: [0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44]}
NO_BLOCK = "has no effect: none of its patterns names a module of this model"


def all_peers(steps: int) -> list[Peer]:
    """List every row of the comparison; the uncached one first."""
    counts = [round(budget * steps) for budget in BUDGETS]
    peers = [Peer(UNCACHED, UNCACHED, {}, lambda subject: Attached())]
    builders = (_trajectory, _block_level, _step_caches, _learned, _mean_velocity, _schedulers, _cache_dit, _diffusers)
    for build in builders:
        peers += build(steps, counts)
    return peers


def isolate(loaded: LoadedPipeline) -> LoadedPipeline:
    """Give the pipeline a class of its own: cache-dit replaces ``__call__`` on the class, for all of its pipelines."""
    own = type("DiTPipeline", (DiTPipeline,), {"__call__": DiTPipeline.__call__, "__module__": DiTPipeline.__module__})
    loaded.pipeline.__class__ = own
    return loaded


def _trajectory(steps: int, counts: list[int]) -> Iterator[Peer]:
    def attach(subject: Subject, budget: float) -> Attached:
        # Every row learns anew: a calibration of another budget must not be at hand.
        with environment("XDG_CACHE_HOME", tempfile.mkdtemp(dir=subject.scratch)):
            engine = apply_cache_on_pipeline(subject.pipeline, adacorr_budget=budget, calibration="auto")
            subject.calibrate()
        return Attached(details=lambda: {"summary": plain(engine.summary())}, remove=engine.remove)

    for budget in BUDGETS:
        settings = {"adacorr_budget": budget, "calibration": "auto"}
        yield Peer(f"trajectory {budget:.2f}", "trajectory", settings, functools.partial(attach, budget=budget))


def _block_level(steps: int, counts: list[int]) -> Iterator[Peer]:
    def attach(subject: Subject, settings: dict[str, Any]) -> Attached:
        engine = apply_cache_on_pipeline(subject.pipeline, **settings)
        return Attached(details=lambda: {"summary": plain(engine.summary())}, remove=engine.remove)

    thresholds = {"Tea": (0.06, 0.12, 0.2, 0.3), "Fast": (0.016, 0.03, 0.06, 0.1), "Fb": (0.05, 0.1, 0.2, 0.35)}
    for base, values in thresholds.items():
        for value in values:
            settings: dict[str, Any] = {"use_cache": base, "rel_l1_thresh": value}
            yield Peer(f"{base} {value:g}", base, settings, functools.partial(attach, settings=settings))
    for budget in BUDGETS:
        settings = {"use_cache": "Tea", "enable_adacorrection": True, "adacorr_budget": budget}
        family = "Tea+AdaCorrection"
        yield Peer(f"{family} {budget:.2f}", family, settings, functools.partial(attach, settings=settings))


def _step_caches(steps: int, counts: list[int]) -> Iterator[Peer]:
    for order in (0, 1):
        for count in counts:
            family = f"even steps, order {order}"
            settings = {"evaluated": evenly(count, steps), "order": order}

            def attach(subject: Subject, chosen: list[int] = settings["evaluated"], order: int = order) -> Attached:
                StepCache(subject.transformer, subject.steps, chosen, Polynomial(order))
                return Attached()

            yield Peer(f"{family}, {count} of {steps}", family, settings, attach)


def _learned(steps: int, counts: list[int]) -> Iterator[Peer]:
    """L2P (arXiv:2604.26365): weights a step on the denoiser's past outputs, fitted on recorded trajectories."""
    for fit, how in ((fit_descent, "Adam"), (fit_least_squares, "least squares")):
        for count in counts:
            published = L2P_STEPS.get(count) if steps == 50 else None
            family = f"L2P, {how}"
            settings = {"evaluated": published or evenly(count, steps), "fit": how}

            def attach(
                subject: Subject,
                chosen: list[int] = settings["evaluated"],
                fit: Callable[[torch.Tensor], torch.Tensor] = fit,
            ) -> Attached:
                weights = fit(record_outputs(subject.transformer, subject.calibrate))
                forecaster: Forecaster = Weighted(weights)
                StepCache(subject.transformer, subject.steps, chosen, forecaster)
                return Attached()

            yield Peer(f"{family}, {count} of {steps}", family, settings, attach)


def _schedulers(steps: int, counts: list[int]) -> Iterator[Peer]:
    classes: dict[str, tuple[type | None, dict[str, Any]]] = {
        "DDIM": (None, {}),
        "DPM++ 2M": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "UniPC": (UniPCMultistepScheduler, {}),
    }
    for name, (scheduler, options) in classes.items():
        for count in counts:

            def attach(subject: Subject, scheduler: Any = scheduler, options: dict[str, Any] = options) -> Attached:
                if scheduler is not None:
                    subject.pipeline.scheduler = scheduler.from_config(subject.pipeline.scheduler.config, **options)
                return Attached()

            family = f"fewer steps, {name}"
            settings = {"scheduler": name, "num_inference_steps": count} | options
            yield Peer(f"{family}, {count}", family, settings, attach, count)


def _cache_dit(steps: int, counts: list[int]) -> Iterator[Peer]:
    for blocks in (1, 8):
        for calibrator in ("", "TaylorSeer-1", "TaylorSeer-2", "DMD", "FoCa"):
            for threshold in RESIDUALS:
                family = f"cache-dit F{blocks}B0 {calibrator}".strip()
                settings: dict[str, Any] = {"Fn_compute_blocks": blocks, "residual_diff_threshold": threshold}
                yield Peer(
                    f"{family} {threshold:g}",
                    family,
                    settings | {"calibrator": calibrator or None},
                    functools.partial(_attach_cache_dit, calibrator=calibrator, settings=settings),
                )
    # What the serving projects that build on it set: fewer steps at the start, no more than three forecast in a row.
    served = {"max_warmup_steps": 4, "max_continuous_cached_steps": 3}
    for threshold in RESIDUALS:
        settings = {"Fn_compute_blocks": 1, "residual_diff_threshold": threshold} | served
        yield Peer(
            f"cache-dit F1B0 served TaylorSeer-1 {threshold:g}",
            "cache-dit F1B0 served TaylorSeer-1",
            settings | {"calibrator": "TaylorSeer-1"},
            functools.partial(_attach_cache_dit, calibrator="TaylorSeer-1", settings=settings),
        )
    masks: dict[str, str | list[int]] = {policy: policy for policy in ("slow", "medium", "fast", "ultra")}
    masks |= {f"even {count}": evenly(count, steps) for count in counts}
    for calibrator in ("", "TaylorSeer-1", "TaylorSeer-2", "DMD", "FoCa"):
        for name, mask in masks.items():
            family = f"cache-dit mask {calibrator}".strip()
            settings = {"Fn_compute_blocks": 1, "steps_computation_policy": "static", "mask": mask}
            yield Peer(
                f"{family} {name}",
                family,
                settings | {"calibrator": calibrator or None},
                functools.partial(_attach_cache_dit, calibrator=calibrator, settings=settings),
            )


def _attach_cache_dit(subject: Subject, calibrator: str, settings: dict[str, Any]) -> Attached:
    """Put cache-dit's DBCache on, through its own adapter for DiT pipelines; what it logs is kept quiet."""
    import cache_dit

    named = {name: value for name, value in settings.items() if name != "mask"}
    mask = settings.get("mask")
    if isinstance(mask, str):
        named["steps_computation_mask"] = cache_dit.steps_mask(total_steps=subject.steps, mask_policy=mask)
    elif mask is not None:
        named["steps_computation_mask"] = [int(step in mask) for step in range(subject.steps)]
    config = cache_dit.DBCacheConfig(Bn_compute_blocks=0, num_inference_steps=subject.steps, **named)
    calibrators: dict[str, Callable[[], Any]] = {
        "": lambda: None,
        "TaylorSeer-1": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
        "TaylorSeer-2": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2),
        "DMD": lambda: cache_dit.DMDCalibratorConfig(),
        "FoCa": lambda: cache_dit.FoCaCalibratorConfig(),
    }
    cache_dit.enable_cache(subject.pipeline, cache_config=config, calibrator_config=calibrators[calibrator]())
    details = {"version": cache_dit.__version__, "max_warmup_steps": config.max_warmup_steps}
    return Attached(details=lambda: details, remove=lambda: cache_dit.disable_cache(subject.pipeline))


def _diffusers(steps: int, counts: list[int]) -> Iterator[Peer]:
    def peer(family: str, value: Any, settings: dict[str, Any], apply: Callable[[Subject], None]) -> Peer:
        return Peer(f"{family} {value}", family, settings, functools.partial(_attach_diffusers, apply=apply))

    for threshold in RESIDUALS:
        yield peer(
            "diffusers FirstBlockCache",
            threshold,
            {"threshold": threshold},
            functools.partial(_first_block, threshold=threshold),
        )
    yield peer("diffusers TaylorSeer, default", 5, {"cache_interval": 5}, functools.partial(_taylor, interval=5))
    kinds = {"parts": [r"transformer_blocks\.\d+\.(attn1|ff)"], "lite": ["proj_out_2"]}
    for kind, active in kinds.items():
        skipped = [r"transformer_blocks\.\d+"] if kind == "lite" else None
        for order in (1, 2):
            for interval in (3, 4, 5):
                settings = {"cache_interval": interval, "max_order": order, "cache_identifiers": active}
                yield peer(
                    f"diffusers TaylorSeer-{order}, {kind}",
                    interval,
                    settings | {"skip_predict_identifiers": skipped},
                    functools.partial(_taylor, interval=interval, order=order, active=active, skipped=skipped),
                )
    for threshold in (0.06, 0.12, 0.24, 0.5):
        for longest in (3, 6):
            yield peer(
                f"diffusers MagCache, at most {longest}",
                threshold,
                {"threshold": threshold, "max_skip_steps": longest},
                functools.partial(_mag, threshold=threshold, longest=longest),
            )
    for every in (2, 5):
        yield peer(
            "diffusers FasterCache",
            every,
            {"unconditional_batch_skip_range": every},
            functools.partial(_faster, every=every),
        )
    for every in (2, 3, 5):
        yield peer(
            "diffusers PAB", every, {"spatial_attention_block_skip_range": every}, functools.partial(_pab, every=every)
        )


def _attach_diffusers(subject: Subject, apply: Callable[[Subject], None]) -> Attached:
    """Put one of diffusers' caches on: this model has no ``cache_context``, so the branch is named by hand."""
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    apply(subject)
    registry = HookRegistry.check_if_exists_or_initialize(subject.transformer)
    registry.invalidate_child_registries_cache()
    if not any(child.hooks for child in (registry, *registry._get_child_registries())):
        raise LookupError(NO_BLOCK)

    def before() -> None:
        registry.reset_stateful_hooks()
        # Both branches of guidance are in one batch.
        _set_cache_context(subject.transformer, CacheContext("both"))

    return Attached(before=before)


def _first_block(subject: Subject, threshold: float) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(subject.transformer, FirstBlockCacheConfig(threshold=threshold))


def _taylor(
    subject: Subject,
    interval: int,
    order: int = 1,
    active: list[str] | None = None,
    skipped: list[str] | None = None,
) -> None:
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks import apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=active,
        skip_predict_identifiers=skipped,
    )
    apply_taylorseer_cache(subject.transformer, config)


def _mag(subject: Subject, threshold: float, longest: int) -> None:
    """Put MagCache on with ratios from the calibration images, which it prints at the end of a generation."""
    from diffusers import MagCacheConfig
    from diffusers.hooks import apply_mag_cache

    config = {"num_inference_steps": subject.steps}
    apply_mag_cache(subject.transformer, MagCacheConfig(calibrate=True, **config))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        subject.calibrate()
    ratios = next(json.loads(line) for line in printed.getvalue().splitlines() if line.startswith("[1"))
    used = MagCacheConfig(threshold=threshold, max_skip_steps=longest, mag_ratios=ratios, **config)
    apply_mag_cache(subject.transformer, used)


def _faster(subject: Subject, every: int) -> None:
    """Put FasterCache on, with the halves of the batch changed over: it takes the first one for the unconditional."""
    from diffusers import FasterCacheConfig
    from diffusers.hooks import apply_faster_cache

    config = FasterCacheConfig(
        unconditional_batch_skip_range=every,
        current_timestep_callback=_timestep_of(subject.transformer),
        tensor_format="BCHW",
        _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
    )
    apply_faster_cache(subject.transformer, config)
    inner = subject.transformer.forward

    def swapped(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(tensor.chunk(2)[::-1])

    def forward(hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> Any:
        output = inner(swapped(hidden_states), timestep=timestep, class_labels=swapped(class_labels))
        output.sample = swapped(output.sample)
        return output

    subject.transformer.forward = forward


def _pab(subject: Subject, every: int) -> None:
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every, current_timestep_callback=_timestep_of(subject.transformer)
    )
    apply_pyramid_attention_broadcast(subject.transformer, config)


def _timestep_of(transformer: nn.Module) -> Callable[[], int]:
    """Return what tells the timestep that the transformer was last called for."""
    seen = [0]

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen[0] = int(kwargs["timestep"][0])

    transformer.register_forward_pre_hook(note, with_kwargs=True)
    return lambda: seen[0]
