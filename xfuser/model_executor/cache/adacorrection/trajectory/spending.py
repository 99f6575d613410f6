"""What a base method would have spent alone, to be spent on the trajectory instead."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration

NOTE = "spent_by_base"


class Counter(Protocol):
    """Counts the base method's evaluations while a pipeline evaluates everything.

    Attributes:
        name: The method with its settings.
    """

    name: str

    def attach(self) -> None:
        """Begin to count; nothing is skipped."""

    def paused(self) -> AbstractContextManager[None]:
        """Do not see the calls that are made within."""

    def detach(self) -> float | None:
        """Leave the pipeline alone again, and tell the share of block evaluations; ``None`` where none was seen."""


class Spending:
    """Knows the budget of each kind of call: counted in one that is evaluated in full, or noted in a calibration.

    Args:
        counter: Counts for one base method.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.wanted = True
        self.counting = False
        self._shares: dict[str, float] = {}

    def begin(self) -> None:
        """Count during the call that follows."""
        self.counter.attach()
        self.counting = True

    def end(self, key: str, whole: bool) -> None:
        """Stop counting.

        Args:
            key: The fingerprint's digest of the call.
            whole: Whether it went through.
        """
        self.counting = False
        share = self.counter.detach()
        if whole and share is not None and key not in self._shares:
            self._shares[key] = share
            self.wanted = False

    def budget(self, key: str, found: Calibration | None) -> float | None:
        """Find what the base method spends in calls of one kind; where it is unknown, the next call is counted."""
        noted = {} if found is None else found.notes.get(NOTE, {})
        if key not in self._shares and self.counter.name in noted:
            self._shares[key] = noted[self.counter.name]
        self.wanted = key not in self._shares
        return self._shares.get(key)

    def note(self, calibration: Calibration) -> None:
        """Write into a calibration what was counted in its kind of call."""
        if calibration.key in self._shares:
            calibration.notes.setdefault(NOTE, {})[self.counter.name] = self._shares[calibration.key]
