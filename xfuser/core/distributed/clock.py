"""Where a step's time goes: seconds by category, on this rank."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CATEGORIES = ("compute", "attention exchange", "statistics", "pipeline", "waiting")


class Clock:
    """Books wall time to the innermost category that is entered; outside any of them nothing is booked.

    Args:
        synchronize: Waits for the device, so that a clock read afterwards is true. ``None`` reads the clock at once,
            which is right where operations block, as they do on a CPU.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._synchronize = synchronize
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, category: str) -> Iterator[None]:
        """Book what happens inside to a category, and to no category around it."""
        self._book()
        self._open.append(category)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def reset(self) -> None:
        self.seconds.clear()

    def _book(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
