"""Learn a calibration of the trajectory from many images, and show what can be chosen from it."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xfuser.config.trajectory import refinement
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration
from xfuser.model_executor.cache.adacorrection.trajectory.goals import speedup_of
from xfuser.model_executor.pipelines.generate import Generation, batches_of, call_of
from xfuser.model_executor.pipelines.loading import LoadedPipeline

PLACEMENTS = 3  # of every budget, compared
BUDGETS = (0.5, 0.38, 0.3, 0.22, 0.16)


def check_calibration(args: argparse.Namespace) -> None:
    """Refuse what cannot be learned, before any model is loaded (ValueError, or OSError for the folder)."""
    for share in args.budgets or ():
        if not 0 < share <= 1:
            raise ValueError(f"--budgets: {share:g} is not above 0 and at most 1")
    try:
        refinement(args.reference_steps)
    except ValueError as error:
        raise ValueError(f"--reference_steps {args.reference_steps}: expected 2x to 16x") from error


def calibrate_trajectory(args: argparse.Namespace, loaded: LoadedPipeline, request: Generation) -> Calibration:
    """Record, place, replay, write the file and the store, and print a table to choose from."""
    budgets = args.budgets or BUDGETS
    goal = {"adacorr_budget": max(budgets), "calibration_reference": args.reference_steps}
    engine = attach_trajectory(loaded.pipeline, **goal)
    batches = batches_of(request)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("generations", total=len(batches) + PLACEMENTS * len(budgets))
            calls = [arguments_of(loaded, request, batch) for batch in batches]
            calibration = engine.learn_from(calls, budgets, lambda: progress.advance(task))
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
    return loaded.arguments(**call_of(request, batch))


def choices(calibration: Calibration) -> Table:
    """Draw the table that a setting is chosen from."""
    title = f"{calibration.steps} steps, {calibration.images} images; share of evaluations, predicted PSNR in dB"
    table = Table(title=title, box=None, pad_edge=False)  # 50 steps fit into 80 columns
    for name in ("share", "speed", "PSNR", "worst seen"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for known in sorted(calibration.learned.values(), key=lambda each: -each.plan.cost):
        table.add_row(
            f"{known.plan.cost:.0%}",
            f"{speedup_of(known.plan, calibration.timing):.2f}x",
            f"{known.predicted_psnr:.1f}" if known.psnr else "–",
            f"{min(known.psnr):.1f}" if known.psnr else "–",
            known.plan.strip(),
        )
    return table
