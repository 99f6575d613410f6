"""Turns one setting of a corrected row until it saves as many FLOPs as the base method that it corrects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np

from benchmark.rows import Row
from xfuser.config.cache import DEFAULT_TOLERANCE

ALLOWED = 0.01  # share of the FLOPs by which a matched row may miss its base
SEARCH_LIMIT = 10  # batches that the search before the run may take
RETRY_LIMIT = 6  # times that the last batch may be generated, to close what is still open
NEAR = 0.1  # what was seen further from the target says little about the slope there
SLOPE = 0.15  # saving per e-fold of the tolerance, where nothing better is known
SLOPES = (0.05, 0.5)


class Saving(Protocol):
    """What an attempt comes back with."""

    @property
    def saved(self) -> float: ...


Attempt = TypeVar("Attempt", bound=Saving)


@dataclass
class Found(Generic[Attempt]):
    """The attempt that came closest, and what had been tried until then was ``bracketed`` by others on both sides."""

    position: float
    attempt: Attempt
    bracketed: bool


class Dial:
    """A setting as a position: the further it is turned, the more is saved.

    Attributes:
        name: Of the setting.
        step: How far the search goes at first.
        limits: Lowest and highest position.
        whole_steps: Whether what is saved goes up by whole steps.
    """

    name: ClassVar[str]
    step: ClassVar[float]
    limits: ClassVar[tuple[float, float]]
    whole_steps: ClassVar[bool] = False

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []  # positions, and what was saved there

    def value(self, position: float) -> float:
        """The setting at a position."""
        raise NotImplementedError

    def guess(self, needed: float, base_hit_rate: float, base_saved: float) -> float:
        """A position that should save what is needed, given what the base method did on the same batch."""
        raise NotImplementedError

    def clip(self, position: float) -> float:
        return min(max(position, self.limits[0]), self.limits[1])


class BudgetDial(Dial):
    """``adacorr_budget``, from all (0) to nothing (1)."""

    name = "adacorr_budget"
    step = 0.02
    limits = (0.0, 1.0)
    whole_steps = True

    def value(self, position: float) -> float:
        return 1 - position

    def guess(self, needed: float, base_hit_rate: float, base_saved: float) -> float:
        # A budget counts block evaluations; the FLOPs outside the blocks are the same part for both.
        return self.clip(needed * base_hit_rate / base_saved if base_saved > 0 else needed)


class ToleranceDial(Dial):
    """``adacorr_tolerance``, as its logarithm."""

    name = "adacorr_tolerance"
    step = math.log(2)
    limits = (math.log(1e-5), math.log(1e3))

    def value(self, position: float) -> float:
        return math.exp(position)

    def guess(self, needed: float, base_hit_rate: float, base_saved: float) -> float:
        if not self.seen:
            return math.log(DEFAULT_TOLERANCE)
        near = [point for point in self.seen if abs(point[1] - needed) < NEAR]
        positions, saved = zip(*(near or [min(self.seen, key=lambda point: abs(point[1] - needed))]), strict=True)
        slope = SLOPE
        if np.ptp(positions) > 0:
            slope = float(np.clip(np.polyfit(positions, saved, 1)[0], *SLOPES))
        turn = (needed - fmean(saved)) / slope
        return self.clip(fmean(positions) + min(max(turn, -self.step), self.step))


def dial_of(row: Row) -> Dial:
    """The dial of a corrected row's mode.

    Raises:
        ValueError: The mode has none: it evaluates everything.
    """
    if row.config.mode == "budget":
        return BudgetDial()
    if row.config.mode in ("bound", "gate"):
        return ToleranceDial()
    raise ValueError(f"--match_compute: mode {row.config.mode!r} never saves, so it cannot match a base method")


def search(
    dial: Dial, start: float, step: float, target: float, close: float, limit: int, trial: Callable[[float], Attempt]
) -> Found[Attempt]:
    """Try positions until one saves the target: ever longer steps to the other side of it, then by bisection.

    Args:
        dial: What is turned; it remembers what was seen.
        start: The first position.
        step: The first step from there; each further one is twice as long.
        target: The share of FLOPs to save.
        close: How near to it is near enough.
        limit: Trials at most.
        trial: Generates with the dial at a position.
    """
    position, low, high = start, -math.inf, math.inf
    best: tuple[float, float, Attempt] | None = None
    for _ in range(limit):
        attempt = trial(position)
        dial.seen.append((position, attempt.saved))
        missing = target - attempt.saved
        if best is None or abs(missing) < best[0]:
            best = (abs(missing), position, attempt)
        if abs(missing) <= close:
            break
        if missing > 0:
            low = max(low, position)
        else:
            high = min(high, position)
        if math.isinf(low) or math.isinf(high):
            # An end that was tried is as far as it goes.
            further = dial.clip(position + math.copysign(step, missing))
            step *= 2
        else:
            further = (low + high) / 2
        if further == position:
            break
        position = further
    assert best is not None
    return Found(best[1], best[2], not (math.isinf(low) or math.isinf(high)))


@dataclass
class Match:
    """The books of one matched row over the run: what its base saved, what it saved, and with which settings."""

    dial: Dial
    values: list[float] = field(default_factory=list)
    images: int = 0
    _target: float = 0.0
    _reached: float = 0.0

    def needed(self, base_saved: float, size: int) -> float:
        """What a batch of that size has to save for both averages to be the same after it."""
        return base_saved + (self._target - self._reached) / size

    def slack(self, size: int) -> float:
        """By how much a batch may miss what it needs to save and leave the averages well within what is allowed."""
        return 0.5 * ALLOWED * (self.images + size) / size

    def take(self, size: int, base_saved: float, saved: float, value: float) -> None:
        self.images += size
        self._target += size * base_saved
        self._reached += size * saved
        self.values.append(value)

    @property
    def target(self) -> float:
        return self._target / self.images

    @property
    def reached(self) -> float:
        return self._reached / self.images

    @property
    def holds(self) -> bool:
        return self.images > 0 and abs(self.reached - self.target) <= ALLOWED
