"""``xdit generate``: from a command line to images and statistics, on one process or many."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from xfuser.commands.checks import (
    ALL_CLASSES,
    check_cache,
    check_conditions,
    check_counting,
    check_generation,
    labels_of,
)
from xfuser.commands.fitting import check_calibration_fits
from xfuser.commands.loaded import load_and_request
from xfuser.commands.stopping import stop
from xfuser.config import CacheConfig
from xfuser.config.arguments import cache_settings, parallel_config, trajectory_settings
from xfuser.config.parallel import ParallelConfig
from xfuser.config.trajectory import GOALS, TrajectoryConfig
from xfuser.core.distributed import launch
from xfuser.core.distributed.environment import choose_device, join_processes, launched, rank, world_size
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.core.distributed.shutdown import begin_together, decided_by_first, finish, watch
from xfuser.model_executor.cache.apply import spends_as_base
from xfuser.model_executor.parallel import AlonePipeline, ParallelPipeline, check_combination, parallelize
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.generate import batches_of, generate_images
from xfuser.model_executor.pipelines.geometry import geometry_of
from xfuser.model_executor.pipelines.loading import LoadedPipeline
from xfuser.model_executor.pipelines.model_types import MODEL_TYPES
from xfuser.model_executor.pipelines.outputs import Outputs
from xfuser.model_executor.pipelines.screens import print_summary

# What has no part in what the images look like.
_NOT_RECORDED = (
    "run",
    "command",
    "script",
    "argv",
    "output_dir",
    "overwrite",
    "resume",
    "timeout",
    "threads",
    "device",
)


def run_generate(args: argparse.Namespace) -> None:
    """Generate what the command line asks for.

    Raises:
        ValueError: It asks for what cannot be; nothing was loaded then.
        OSError: Nothing can be written into the output folder.
    """
    resolve_model(args)
    check_conditions(args)
    check_cache(args)
    cache, settings = cache_of(args)
    parallel = parallel_config(args)
    check_generation(args, parallel)
    if isinstance(cache, CacheConfig):
        check_combination(cache, parallel)
    device = choose_device(args.device)
    if launched():
        parallel.check_world(world_size())
    if parallel.world_size > 1:
        geometry_of(args.model_type, args.model, args.height, args.width).check(parallel)
    outputs = outputs_of(args)
    if not launched():
        outputs.check()
        if parallel.world_size > 1:
            raise SystemExit(launch.start_processes(parallel.world_size, args.argv, args.script))
    else:
        watch(f"xdit {args.command}")

    def begin() -> tuple[Any, ...]:
        finished, complete = decided_by_first(lambda: (outputs.check(), outputs.complete()))
        if complete:
            return finished, None
        loaded, request = load_and_request(args)
        batches_of(request, parallel.data_parallel_degree)
        if args.enable_tiling:
            loaded.pipeline.vae.enable_tiling()
        if args.enable_slicing:
            loaded.pipeline.vae.enable_slicing()
        return finished, (loaded, request)

    def spread(loaded: LoadedPipeline) -> ParallelPipeline | AlonePipeline:
        if spends_as_base(settings.get("use_cache"), settings):
            return AlonePipeline(loaded.pipeline, mesh, use_torch_compile=args.use_torch_compile, **settings)
        return parallelize(loaded.pipeline, mesh, use_torch_compile=args.use_torch_compile, **settings)

    document = None
    try:
        join_processes(device, args.timeout)
        mesh = ParallelMesh(parallel, device)
        finished, prepared = begin_together(begin)
        if prepared is not None:
            loaded, request = prepared
            # Not before all have loaded: ranks settle this among those that share an image.
            parallelized = begin_together(lambda: spread(loaded))
            document = generate_images(loaded, request, parallelized, outputs, finished, said_of(args, cache, parallel))
        elif rank() == 0:
            print(f"{args.output_dir}: all {len(finished)} images are there; nothing was left to do")
    except Exception as error:
        stop(f"xdit {args.command}", error)
    if document is not None:
        print_summary(document, args.output_dir)
    finish()


def cache_of(args: argparse.Namespace) -> tuple[CacheConfig | TrajectoryConfig, dict[str, Any]]:
    """The cache that a command line asks for, checked, and its settings by name (ValueError)."""
    settings = trajectory_settings(args)
    if settings is None:
        settings = cache_settings(args, MODEL_TYPES[args.model_type].thresholds)
        if not spends_as_base(settings["use_cache"], settings):
            check_calibration_fits(args, None)
            return CacheConfig.from_keywords(**settings), settings
        check_counting(args)
        check_calibration_fits(args, f"--use_cache {settings['use_cache']}")
        return CacheConfig.from_keywords(**{**settings, "calibration": None}), settings
    goal = next(name for name in GOALS if name in settings)
    check_calibration_fits(args, f"--{goal}")
    return TrajectoryConfig(**settings), settings


def outputs_of(args: argparse.Namespace) -> Outputs:
    """The folder that is written, with all settings that its images depend on."""
    recorded = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in sorted(vars(args).items())
        if name not in _NOT_RECORDED and not name.endswith("_named")
    }
    count = args.num_images or len(args.class_label or args.prompt or range(classes_shown(args)))
    return Outputs(args.output_dir, recorded, count, args.image_format, args.save_raw, args.overwrite, args.resume)


def classes_shown(args: argparse.Namespace) -> int:
    """How many classes a model of labels draws where none is named, as its index tells."""
    return min(ALL_CLASSES, len(set(labels_of(args).values())) or ALL_CLASSES)


def said_of(
    args: argparse.Namespace, cache: CacheConfig | TrajectoryConfig, parallel: ParallelConfig
) -> dict[str, Any]:
    """What ``statistics.json`` is told of the settings in force."""
    return {"cache": vars(cache), "parallel": vars(parallel), "use_torch_compile": args.use_torch_compile}
