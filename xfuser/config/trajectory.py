"""Settings of AdaCorrection on the trajectory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from xfuser.config.settings import check_values, count, number, path, switch, word

AUTO = "auto"
GOALS = ("target_speedup", "min_psnr", "adacorr_budget")


def refinement(reference: str | None) -> int:
    """Read how many times finer the reference's grid is: ``"4x"`` is 4, ``None`` 1 (ValueError otherwise)."""
    if reference is None:
        return 1
    text = reference.removesuffix("x") if isinstance(reference, str) else ""
    if not text.isdigit() or not 2 <= int(text) <= 16:
        raise ValueError(f"calibration_reference={reference!r}: expected 2x to 16x")
    return int(text)


def _check_reference(name: str, value: Any) -> None:
    refinement(value)


@dataclass(frozen=True)
class TrajectoryConfig:
    """Settings of AdaCorrection on the trajectory, of which exactly one of the first three is named.

    Raises:
        ValueError: A value is out of its range, or not exactly one of the three goals is named.
    """

    target_speedup: float | None = number(
        None,
        "how many times faster the denoising loop is to be, wall clock, above 1 (start here)",
        above=1,
        otherwise="none",
        metavar="X",
    )
    min_psnr: float | None = number(
        None,
        "how near the decoded image stays to the uncached one, in dB: the fewest evaluations that are predicted to",
        high=200,
        above=0,
        otherwise="none",
        metavar="DB",
    )
    adacorr_budget: float | None = number(
        None,
        "the share of the denoiser's evaluations; a conditional branch of guidance alone counts half",
        high=1,
        above=0,
        otherwise="none",
    )
    calibration: str | PathLike[str] = path(
        "'auto': a stored one that fits, else learn from the first generation and store it; 'first': learn from it, "
        "and neither look nor store; or a file of `xdit calibrate --level trajectory`",
        (AUTO, "first"),
        default=AUTO,
    )
    calibration_images: int = count(1, "generations are evaluated in full until so many images are known")
    calibration_reference: str | None = word(
        "learn from a run on a grid of so many times the steps, which is nearer to what the model means",
        _check_reference,
        otherwise="none",
        allowed="`2x` to `16x`",
    )
    replay: bool = switch(
        True, "learn by replaying the recorded generation under the plan; off, the denoiser is not called, and worse"
    )
    branches_apart: bool = switch(True, "whether a step may evaluate the conditional branch of guidance alone")
    store: str | PathLike[str] | None = path(
        "folder of stored calibrations", (), otherwise="`$XDG_CACHE_HOME/xfuser/trajectory`"
    )

    def __post_init__(self) -> None:
        named = [name for name in GOALS if getattr(self, name) is not None]
        if len(named) != 1:
            said = "none is" if not named else " and ".join(named) + " are"
            raise ValueError(f"name exactly one of {', '.join(GOALS)}; {said} set")
        check_values(self)
        if self.calibration_reference is not None and not self.replay:
            raise ValueError("calibration_reference needs the replay; leave replay=False out")


def goals_with_flags() -> list[Any]:
    """List the goals whose flags are theirs alone; that of ``adacorr_budget`` is the block level's too."""
    return [each for each in fields(TrajectoryConfig) if each.name in GOALS[:2]]
