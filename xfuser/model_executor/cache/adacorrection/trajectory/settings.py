"""What the trajectory level may be told, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from xfuser.config.settings import plain_number

AUTO = "auto"


@dataclass(frozen=True)
class TrajectoryConfig:
    """Settings of AdaCorrection on the trajectory. Exactly one of the first three is set.

    Args:
        target_speedup: How many times faster the denoising loop is to be, wall clock, above 1.
        min_psnr: The fewest evaluations are taken whose predicted PSNR to the uncached image reaches this, in dB.
        adacorr_budget: The share of the denoiser's evaluations that may be spent, above 0 and at most 1; a conditional
            branch evaluated alone counts half.
        calibration: ``"auto"`` looks for a stored one that fits and learns from the first generation where there is
            none; ``"first"`` learns from the first generation, and neither looks nor stores; or a file that ``xdit
            calibrate --level trajectory`` wrote.
        replay: Learn the weights by replaying the recorded generation under the plan (closed loop); without it they
            come from the recording alone.
        calibration_images: Generations are evaluated in full until so many images are known.
        calibration_reference: ``"4x"`` learns from a run on a grid of four times as many steps, which is nearer to what
            the model means.
        store: Folder of stored calibrations; by default ``$XDG_CACHE_HOME/xfuser``.
        branches_apart: Whether a step may evaluate the conditional branch of guidance alone.

    Raises:
        ValueError: A value is out of its range, or not exactly one of the three goals is named.
    """

    target_speedup: float | None = None
    min_psnr: float | None = None
    adacorr_budget: float | None = None
    calibration: str | PathLike[str] = AUTO
    replay: bool = True
    calibration_images: int = 1
    calibration_reference: str | None = None
    store: str | PathLike[str] | None = None
    branches_apart: bool = True

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, plain_number(getattr(self, each.name)))
        goals = ("target_speedup", "min_psnr", "adacorr_budget")
        named = [name for name in goals if getattr(self, name) is not None]
        if len(named) != 1:
            said = "none is" if not named else " and ".join(named) + " are"
            raise ValueError(f"name exactly one of {', '.join(goals)}; {said} set")
        _between(named[0], getattr(self, named[0]), *_RANGES[named[0]])
        for name in ("replay", "branches_apart"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")
        count = self.calibration_images
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"calibration_images={count!r}: expected a whole number, 1 or more")
        if not isinstance(self.calibration, (str, PathLike)):
            raise ValueError(f"calibration={self.calibration!r}: expected 'auto', 'first' or a file")
        refinement(self.calibration_reference)
        if self.calibration_reference is not None and not self.replay:
            raise ValueError("calibration_reference needs the replay; leave replay=False out")


_RANGES = {"target_speedup": (1, math.inf), "min_psnr": (0, 200), "adacorr_budget": (0, 1)}


def refinement(reference: str | None) -> int:
    """Read how many times finer the reference's grid is: ``"4x"`` is 4, ``None`` 1 (ValueError otherwise)."""
    if reference is None:
        return 1
    text = reference.removesuffix("x") if isinstance(reference, str) else ""
    if not text.isdigit() or not 2 <= int(text) <= 16:
        raise ValueError(f"calibration_reference={reference!r}: expected 2x to 16x")
    return int(text)


def _between(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) or hasattr(value, "__float__")
    if isinstance(value, (bool, str)) or not number or not low < float(value) <= high or math.isinf(float(value)):
        limits = f"above {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise ValueError(f"{name}={value!r}: expected a number {limits}")
