"""Tell in plain types how a generation went."""

from __future__ import annotations

from typing import Any

from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration, Learned
from xfuser.model_executor.cache.adacorrection.trajectory.generation import Generation
from xfuser.model_executor.cache.adacorrection.trajectory.goals import Goal
from xfuser.model_executor.cache.adacorrection.trajectory.plan import FULL


def describe(
    generation: Generation, calibration: Calibration | None, learned: Learned | None, goal: Goal
) -> dict[str, Any]:
    """Name what a finished generation evaluated, and what was predicted and got.

    Args:
        generation: The generation.
        calibration: What is known of its kind.
        learned: The plan that it followed, if it did.
        goal: What was asked for.
    """
    plan = generation.evaluated
    steps = max(len(plan), 1)
    share = sum(plan) / (FULL * steps)
    return {
        "steps": len(plan),
        "plan": plan,
        "strip": learned.plan.strip() if learned else "█" * len(plan),
        "evaluated_steps": sum(kind > 0 for kind in plan),
        "evaluated_share": share,
        "hit_rate": 1 - share,
        "flops_saved": 1 - share,
        "denoiser_calls": generation.denoiser_calls,
        "plan_digest": learned.plan.digest if learned else None,
        "memory_bytes": generation.memory_bytes(),
        "non_finite": generation.corrections_dropped(),
        "loop_seconds": generation.seconds,
        "predicted": goal.predicted(calibration, learned),
        "got": goal.got(calibration, generation.seconds, share, generation.batch),
        "images_known": 0 if calibration is None else calibration.images,
        "weights": [] if learned is None else [weights.tolist() for weights in learned.weights],
        "differs": _differences(generation, calibration),
        "not_learned_because": generation.broken,
    }


def _differences(generation: Generation, calibration: Calibration | None) -> list[str]:
    """Say in which respects that may differ a generation is not like those that were learned from."""
    notes = {} if calibration is None else calibration.notes
    ours = {"batch": generation.batch, "shape": generation.shape}
    pairs = ((name, ours[name], notes[name]) for name in ours if name in notes)
    return [f"{name} {mine}, learned with {known}" for name, mine, known in pairs if mine != known]
