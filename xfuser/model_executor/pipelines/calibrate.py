"""Learn a calibration of the trajectory from many images, and show what can be chosen from it."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xfuser.core.console import check_output_folder
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration
from xfuser.model_executor.cache.adacorrection.trajectory.goals import speedup_of
from xfuser.model_executor.pipelines.generate import Generation, batches_of
from xfuser.model_executor.pipelines.loading import LoadedPipeline

PLACEMENTS = 3  # of every budget, compared


def calibrate_trajectory(args: argparse.Namespace, loaded: LoadedPipeline, request: Generation) -> Calibration:
    """Record, place, replay, write the file and the store, and print a table to choose from."""
    check_output_folder(args.output.parent, "--output")
    if args.output.suffix != ".safetensors":
        raise ValueError(f"--output: {str(args.output)!r} does not end in .safetensors")
    for share in args.budgets:
        if not 0 < share < 1:
            raise ValueError(f"--budgets: {share:g} is not between 0 and 1")
    goal = {"adacorr_budget": max(args.budgets), "calibration_reference": args.reference_steps}
    engine = attach_trajectory(loaded.pipeline, **goal)
    batches = batches_of(request)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("generations", total=len(batches) + PLACEMENTS * len(args.budgets))
            calls = [arguments_of(loaded, request, batch) for batch in batches]
            calibration = engine.learn_from(calls, args.budgets, lambda: progress.advance(task))
            progress.update(task, completed=progress.tasks[0].total)
    finally:
        engine.remove()
    calibration.notes |= {"model": loaded.name, "seed": request.seed, "guidance_scale": request.guidance_scale}
    calibration.save(args.output, compact=True)
    Console().print(choices(calibration))
    Console().print(f"{args.output}: {calibration.images} images, {calibration.steps} steps", markup=False)
    return calibration


def arguments_of(loaded: LoadedPipeline, request: Generation, batch: range) -> dict[str, Any]:
    """Make the pipeline's arguments for some of a request's images."""
    return loaded.arguments(
        [request.conditions[index % len(request.conditions)] for index in batch],
        [request.seed + index for index in batch],
        request.num_inference_steps,
        request.guidance_scale,
        request.height,
        request.width,
        request.negative_prompt,
        request.true_cfg_scale,
    )


def choices(calibration: Calibration) -> Table:
    """Draw the table that a setting is chosen from."""
    table = Table(title=f"{calibration.steps} steps, {calibration.images} images")
    for name in ("evaluations", "speed-up", "PSNR (dB)", "worst", "plan"):
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=True)
    for known in sorted(calibration.learned.values(), key=lambda each: -each.plan.cost):
        table.add_row(
            f"{known.plan.cost:.0%}",
            f"{speedup_of(known.plan, calibration.timing):.2f}x",
            f"{known.predicted_psnr:.1f}" if known.psnr else "–",
            f"{min(known.psnr):.1f}" if known.psnr else "–",
            known.plan.strip(),
        )
    return table
