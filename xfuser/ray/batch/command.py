"""``xdit batch``: from a command line to a folder of images that lacks none."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from xfuser.commands.checks import check_cache
from xfuser.commands.fitting import check_calibration_fits
from xfuser.config import CacheConfig
from xfuser.config.arguments import cache_settings, parallel_config, trajectory_settings
from xfuser.config.cache import FIRST
from xfuser.config.flags import in_flags
from xfuser.config.parallel import ParallelConfig
from xfuser.config.trajectory import GOALS, TrajectoryConfig
from xfuser.core.distributed.environment import check_device
from xfuser.core.distributed.shutdown import NotStarted
from xfuser.core.files import write_json
from xfuser.model_executor.cache.apply import spends_as_base
from xfuser.model_executor.parallel import check_combination
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.geometry import geometry_of
from xfuser.model_executor.pipelines.model_types import MODEL_TYPES
from xfuser.ray.batch.batches import Plan
from xfuser.ray.batch.folder import SUMMARY, JobFolder
from xfuser.ray.batch.job import Job, Limits, State, Stopped, cpu_seconds
from xfuser.ray.batch.manifest import merge
from xfuser.ray.batch.progress import Screen
from xfuser.ray.batch.prompts import Rejected, files_of, read_requests
from xfuser.ray.batch.report import write_report
from xfuser.ray.batch.requests import Rules
from xfuser.ray.batch.session import ray_session
from xfuser.ray.batch.stopping import BY_SIGNAL, StopRequests
from xfuser.ray.generator import calibration_files
from xfuser.ray.rank import EngineSettings

SOME_REJECTED = 3  # the exit code
STOPPED = 1


def run_batch(args: argparse.Namespace) -> None:
    """Do what is missing of the job that the command line names; leaves with an exit code where it is not all.

    Raises:
        ValueError: It asks for what cannot be; nothing was started then.
        OSError: Nothing can be written into the output folder.
    """
    began = time.time()
    files_of(args.prompts)
    resolve_model(args)
    settings = engine_settings(args)
    rules = rules_of(args, settings)
    folder = JobFolder(args.output_dir, recorded_settings(args, settings), args.resume, args.overwrite)
    try:
        plan, rejected = folder.begin(read_requests(args.prompts, rules), args.batch_size)
        if not len(plan):
            raise ValueError(
                f"--prompts {args.prompts}: all {len(rejected)} lines are bad; see {folder.path}/rejected.jsonl"
            )
        with StopRequests() as stops:
            code = _run(args, settings, folder, plan, rejected, began, stops)
    finally:
        folder.close()
    if code:
        raise SystemExit(code)


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """Collect what every group is to load, and check it before anything is loaded (ValueError)."""
    if args.calibration == FIRST:
        raise ValueError("--calibration first: a job learns once, for all groups, anyhow; leave it out, or name a file")
    check_device(args.device)
    check_cache(args)
    parallel = parallel_config(args)
    if parallel.data_parallel_degree > 1:
        raise ValueError(
            f"--data_parallel_degree {parallel.data_parallel_degree}: groups make different images anyhow; use --groups"
        )
    geometry_of(args.model_type, args.model, args.height, args.width).check(parallel)
    cache = cache_of(args, parallel)
    return EngineSettings(
        args.model_type,
        args.model,
        parallel,
        cache,
        calibration_files(cache.get("calibration")),
        args.device,
        args.threads,
        args.use_torch_compile,
        args.enable_tiling,
        args.enable_slicing,
        args.timeout,
    )


def cache_of(args: argparse.Namespace, parallel: ParallelConfig) -> dict[str, Any]:
    """Collect the cache's settings by name (ValueError where they do not go together)."""
    settings = trajectory_settings(args)
    if settings is not None:
        goal = next(name for name in GOALS if name in settings)
        check_calibration_fits(args, f"--{goal}")
        TrajectoryConfig(**settings)
        return settings
    settings = cache_settings(args, MODEL_TYPES[args.model_type].thresholds)
    if spends_as_base(settings["use_cache"], settings):
        said = f"--calibration {args.calibration} with --use_cache {settings['use_cache']}"
        raise ValueError(
            f"{said}: each group would count anew what the base method spends; name --adacorr_budget and no base method"
        )
    check_calibration_fits(args, None)
    check_combination(CacheConfig.from_keywords(**settings), parallel)
    return settings


def rules_of(args: argparse.Namespace, settings: EngineSettings) -> Rules:
    """Read from the model what a line may say, and from the command line what holds where it does not."""
    return Rules.of(
        args.model_type,
        args.model,
        args.num_inference_steps,
        args.guidance_scale,
        steps=args.num_inference_steps if settings.calibration else None,
        seed=args.seed,
        height=args.height,
        width=args.width,
        max_sequence_length=args.max_sequence_length,
    )


def recorded_settings(args: argparse.Namespace, settings: EngineSettings) -> dict[str, Any]:
    """Collect all settings that the images depend on, in plain types."""
    names = ("model", "model_type", "batch_size", "image_format", "seed", "num_inference_steps", "guidance_scale")
    names += ("height", "width", "max_sequence_length", "use_torch_compile", "enable_tiling", "calibration_images")
    parallel = {name: value for name, value in vars(settings.parallel).items() if name != "verify_agreement"}
    cache = {name: str(value) if isinstance(value, Path) else value for name, value in settings.cache.items()}
    return {name: getattr(args, name) for name in names} | {"cache": cache, "parallel": parallel}


def _run(
    args: argparse.Namespace,
    settings: EngineSettings,
    folder: JobFolder,
    plan: Plan,
    rejected: list[Rejected],
    began: float,
    stops: StopRequests,
) -> int:
    limits = Limits(
        *args.groups, args.max_attempts, args.grace, args.timeout, args.calibration_images, args.threads or 1
    )
    screen: list[Screen] = []

    def show(state: State) -> None:
        screen[0].show(state)

    job = Job(folder, plan, settings, limits, rejected, show, args.image_format, stops)
    stopped: Stopped | NotStarted | None = None
    times = {"prepare": time.time() - began}
    if job.left:
        start = time.time()
        groups = min(limits.fewest, job.left)
        try:
            with ray_session(args.ray_address, groups * settings.parallel.world_size, limits.cpus):
                times["start_ray"] = time.time() - start
                with Screen(len(plan), job.state.done) as shown:
                    screen.append(shown)
                    start = time.time()
                    job.run()
                    times["job"] = time.time() - start
        except (Stopped, NotStarted) as error:
            stopped = error
    folder.clean()
    if stopped is not None:
        left = len(plan) - job.state.done
        print(
            f"xdit batch: {stopped}; {job.state.done} of {len(plan)} images are there, and the same command makes the "
            f"other {left}",
            file=sys.stderr,
        )
        return BY_SIGNAL[stopped.signal] if isinstance(stopped, Stopped) and stopped.signal else STOPPED
    stops.finish()
    summary = finish(args, folder, plan, job, times | {"all": time.time() - began})
    print_outcome(folder, summary, job.rejected)
    return SOME_REJECTED if job.rejected else 0


def finish(
    args: argparse.Namespace, folder: JobFolder, plan: Plan, job: Job, seconds: dict[str, float]
) -> dict[str, Any]:
    """Merge the manifest, and write summary and report."""
    state = job.state
    merged = merge(folder.path, plan)
    lost = merged["missing"] - len([each for each in job.rejected if each.attempts])
    if lost > 0:
        raise OSError(f"{folder.path}: {lost} images have no row in the manifest; run the same command again")
    batches = np.array(state.batch_seconds or [0.0])
    summary = {
        "requests": len(plan),
        "rejected": len(job.rejected),
        **merged,
        "settings": recorded_settings(args, job.settings),
        "run": {
            "images": state.made,
            "seconds": seconds["all"],
            "seconds_of": seconds,
            "images_per_second": state.made / seconds["job"] if seconds.get("job") else None,
            "retries": state.retries,
            "learn_seconds": state.learn_seconds,
            "driver_cpu_seconds": state.driver_seconds,
            "command_cpu_seconds": cpu_seconds(),
            "appended_bytes": state.manifest_bytes,
            "batch_seconds": {name: float(np.quantile(batches, at)) for name, at in _QUANTILES.items()},
            "batches": [round(each, 4) for each in state.batch_seconds],
            "writes": [round(each, 4) for each in state.write_seconds],
            "groups": job.groups,
        },
    }
    write_json(folder.path / SUMMARY, summary)
    if merged["images"]:
        write_report(folder.path, summary, job.rejected)
    return summary


_QUANTILES = {"median": 0.5, "p95": 0.95, "most": 1.0}


def print_outcome(folder: JobFolder, summary: dict[str, Any], rejected: list[Rejected]) -> None:
    """Print how many images there are, at what rate, and what was rejected."""
    run = summary["run"]
    rate = f", {run['images_per_second']:.2f} a second" if run["images"] else ""
    share = summary["evaluated_share"]
    evaluated = "" if share is None else f", {share:.0%} of the denoiser's work evaluated"
    print(f"{summary['images']} images in {folder.path}: {run['images']} in this run{rate}{evaluated}")
    print(f"{folder.path}/report.html and manifest.parquet tell all of it")
    if rejected:
        first = rejected[0]
        print(
            f"xdit batch: {len(rejected)} rejected, in {folder.path}/rejected.jsonl; the first: {first.file}, line "
            f"{first.line}: {in_flags(first.reason)}",
            file=sys.stderr,
        )
