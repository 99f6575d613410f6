"""Whether a calibration file fits what a command line asks for, told before the model is loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from xfuser.config.cache import FIRST
from xfuser.config.trajectory import AUTO
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import KIND
from xfuser.model_executor.pipelines.choosing import read_index
from xfuser.model_executor.pipelines.model_types import MODEL_TYPES
from xfuser.model_executor.pipelines.shipped import INDEX, own_model

GOES_WITH = (
    "goes with --target_speedup, --min_psnr or --adacorr_budget and no base method, or with one and "
    "--enable_adacorrection"
)


def check_calibration_fits(args: argparse.Namespace, goal: str | None) -> None:
    """Refuse a calibration of another kind, model, scheduler or number of steps.

    Weights are compared once they are loaded.

    Args:
        args: The command line.
        goal: The flag that asks for the trajectory; ``None`` for the block level.

    Raises:
        ValueError: It does not fit, or cannot be read.
    """
    if args.calibration in (None, FIRST) or (goal is not None and args.calibration == AUTO):
        return
    path, named = Path(args.calibration), f"--calibration {args.calibration}"
    if goal is None and args.calibration == AUTO:
        raise ValueError(f"{named} {GOES_WITH}")
    if not path.is_file():
        raise ValueError(f"{named}: no such file; make it with `xdit calibrate --output {args.calibration}`")
    made_with = _described(path, named)
    of_trajectory = made_with.get("kind") == KIND
    if of_trajectory and goal is None:
        raise ValueError(f"{named} is of the trajectory: it {GOES_WITH}")
    if goal is not None and not of_trajectory:
        raise ValueError(
            f"{named} is of the blocks, and {goal} needs one of the trajectory; make it with `xdit calibrate --level "
            "trajectory`"
        )
    steps = made_with.get("steps" if of_trajectory else "num_steps")
    if steps != args.num_inference_steps:
        raise ValueError(
            f"{named} was made with {steps} steps, and --num_inference_steps is {args.num_inference_steps}; name the "
            "same number, or calibrate again"
        )
    _check_model(args, named, made_with)


def _check_model(args: argparse.Namespace, named: str, made_with: dict[str, Any]) -> None:
    """Compare the classes of the transformer and of the scheduler."""
    theirs = {"transformer": made_with.get("transformer"), "scheduler": made_with.get("scheduler")}
    if "fingerprint" in made_with:
        described = made_with["fingerprint"]
        theirs = {
            "transformer": next(iter(described["denoisers"].values()), {}).get("class"),
            "scheduler": described["scheduler"]["class"],
        }
    for part, ours in _classes(args).items():
        if theirs[part] is not None and theirs[part] != ours:
            raise ValueError(
                f"{named} was made with {theirs[part]}, and this model has {ours}; make one for it with `xdit "
                "calibrate`"
            )


def _classes(args: argparse.Namespace) -> dict[str, str]:
    """What is known of the model without loading it: the class of its transformer, and mostly that of its scheduler."""
    spec = MODEL_TYPES[args.model_type]
    known = {"transformer": spec.transformer_class}
    source = args.model or own_model(args.model_type) or ""
    if (Path(source) / INDEX).is_file():
        index = read_index(str(source))
        if isinstance(index.get("scheduler"), list):
            known["scheduler"] = index["scheduler"][1]
    return known


def _described(path: Path, named: str) -> dict[str, Any]:
    """The document that a calibration carries, or has beside it (ValueError where there is none)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            carried = (file.metadata() or {}).get("document")
        text = carried if carried is not None else path.with_suffix(".json").read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, SafetensorError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{named} cannot be read ({reason}); make it again with `xdit calibrate`") from error
    if not isinstance(document, dict):
        raise ValueError(f"{named} does not say what it was made with; make it again with `xdit calibrate`")
    return document
