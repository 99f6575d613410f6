"""From the one number that was asked for to a plan, and what is predicted and reported of it."""

from __future__ import annotations

from typing import Any

from xfuser.config.trajectory import TrajectoryConfig
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration, Learned
from xfuser.model_executor.cache.adacorrection.trajectory.plan import CONDITIONAL, FULL, Plan

CLOSE = 0.06  # relative, of a learned plan's speed-up to what is asked
NEAR = FULL  # half evaluations by which a learned plan may stay below what is asked


class Unreachable(ValueError):
    """What was asked for cannot be had; the line says what can."""


def speedup_of(plan: Plan, timing: dict[str, float]) -> float:
    """Predict the denoising loop's speed-up from the seconds of one uncached step and of one correction."""
    evaluations = plan.kinds.count(FULL) + timing["half_share"] * plan.kinds.count(CONDITIONAL)
    return _speedup_at(FULL * evaluations, plan.steps, timing)


class Goal:
    """One of ``target_speedup``, ``min_psnr`` and ``adacorr_budget``.

    Attributes:
        budget: The share of evaluations, where it is the goal; ``None`` too while a base method is still counted.
    """

    def __init__(self, config: TrajectoryConfig, may_part: bool = True) -> None:
        self.config = config
        self.budget = config.adacorr_budget
        self._may_part = may_part and config.branches_apart

    def asked(self) -> dict[str, float]:
        names = ("target_speedup", "min_psnr", "adacorr_budget")
        named = {name: float(getattr(self.config, name)) for name in names if getattr(self.config, name) is not None}
        if "adacorr_budget" not in named:
            return named
        return {} if self.budget is None else {"adacorr_budget": float(self.budget)}

    @property
    def by_quality(self) -> bool:
        return self.config.min_psnr is not None

    def parts(self, calibration: Calibration) -> bool:
        """Whether a step may evaluate the conditional branch alone, here and with what is known."""
        return self._may_part and calibration.apart

    def units(self, steps: int, timing: dict[str, float], apart: bool) -> int:
        """Compute the half evaluations to spend; for the goals that need no quality.

        Raises:
            Unreachable: Even one evaluation is too slow, or costs more than the budget.
        """
        if self.budget is not None:
            units = int(self.budget * FULL * steps + 1e-9)
            units -= 0 if apart else units % FULL
            if units < FULL:
                raise Unreachable(
                    f"adacorr_budget={self.budget:g} is less than one of {steps} evaluations; the "
                    f"smallest is {1 / steps:.3g}"
                )
            return units
        asked = float(self.config.target_speedup or 1)
        largest = speedup_of(Plan.at(steps, [0]), timing)
        if asked > largest:
            raise Unreachable(
                f"target_speedup={asked:g}: with {steps} steps and {_beside(timing) / timing['denoiser']:.1%} of the "
                f"denoiser's time outside it, the largest is {largest:.2f}"
            )
        candidates = range(FULL, FULL * steps + 1, 1 if apart else FULL)
        return min(candidates, key=lambda units: abs(_speedup_at(units, steps, timing) / asked - 1))

    def choose(self, calibration: Calibration, given: bool = False) -> Learned | None:
        """Find the learned plan that serves the goal; ``None`` where it has to be learned first.

        Args:
            calibration: What is known.
            given: Nothing more will be learned: the best plan within the goal is taken.

        Raises:
            ValueError: No plan of a given calibration is within the goal.
        """
        learned = sorted(calibration.learned.values(), key=lambda each: sum(each.plan.kinds))
        if not self.parts(calibration):
            # It may have been learned where branches could be evaluated apart.
            learned = [each for each in learned if CONDITIONAL not in each.plan.kinds]
        if self.by_quality:
            enough = [each for each in learned if (each.predicted_psnr or 0) >= float(self.config.min_psnr or 0)]
            if given:
                return _named(enough, learned)[0]
            if self.config.min_psnr not in calibration.notes.get("searched_psnr", []):
                return None
            return enough[0] if enough else max(learned, key=lambda each: each.predicted_psnr or 0.0, default=None)
        units = self.units(calibration.steps, calibration.timing, self.parts(calibration))
        if given:
            within = _named([each for each in learned if sum(each.plan.kinds) <= units], learned)
            return max(within, key=lambda each: sum(each.plan.kinds))
        if self.config.target_speedup is not None:
            # Halves take more than half their time in small batches, so the plans themselves are asked.
            asked = float(self.config.target_speedup)
            answer = calibration.notes.get("speedups", {}).get(f"{asked:g}")
            for each in learned:
                if each.plan.digest == answer:  # few steps may allow no nearer one
                    return each
            near = {each.plan.digest: abs(speedup_of(each.plan, calibration.timing) / asked - 1) for each in learned}
            close = [each for each in learned if near[each.plan.digest] <= CLOSE]
            return min(close, key=lambda each: near[each.plan.digest], default=None)
        within = [each for each in learned if units - NEAR < sum(each.plan.kinds) <= units]
        if not within:
            return None
        return max(within, key=lambda each: (sum(each.plan.kinds), each.predicted_psnr or 0.0))

    def predicted(self, calibration: Calibration | None, learned: Learned | None) -> dict[str, Any] | None:
        if calibration is None or learned is None:
            return None
        return {
            "speedup": speedup_of(learned.plan, calibration.timing),
            "budget": learned.plan.cost,
            "psnr": learned.predicted_psnr,
            "worst_psnr": min(learned.psnr, default=None),
            "of_decoded_images": learned.decoded,
            "mean_shrinkage": sum(learned.shrinkage) / max(len(learned.shrinkage), 1),
        }

    def got(self, calibration: Calibration | None, seconds: float, share: float, batch: int) -> dict[str, Any]:
        speedup = None
        if calibration is not None and calibration.notes.get("batch") == batch and seconds > 0:
            timing = calibration.timing
            speedup = calibration.steps * (timing["denoiser"] + timing["outside"]) / seconds
        return {"speedup": speedup, "budget": share}


def _named(within: list[Learned], learned: list[Learned]) -> list[Learned]:
    if within:
        return within
    known = ", ".join(f"{each.plan.cost:.2f} ({each.predicted_psnr or 0:.1f} dB)" for each in learned)
    raise ValueError(f"calibration: it knows no plan within the goal, only budgets {known}; use calibration='auto'")


def _beside(timing: dict[str, float]) -> float:
    """Sum up a cached step's seconds beside the denoiser; files of earlier versions did not time the correction."""
    return timing["outside"] + timing.get("correction", 0.0)


def _speedup_at(units: float, steps: int, timing: dict[str, float]) -> float:
    spent = steps * _beside(timing) + timing["denoiser"] * units / FULL
    return steps * (timing["denoiser"] + timing["outside"]) / spent
