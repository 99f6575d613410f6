"""Ctrl-C and SIGTERM while a job runs: heard once, they ask it to end in order; heard again, they end it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

BY_SIGNAL = {"SIGINT": 130, "SIGTERM": 143}  # exit codes, as a shell has them
_AT_WORK, _FINISHING = 3, 2  # the signal that ends the command wherever it is
_BORNE = b"xdit batch: all is done but the table and the report, which take a moment; another signal ends that\n"


class StopRequests:
    """Hears Ctrl-C and SIGTERM, from `listen` on until the block is left.

    Attributes:
        first: The name of the signal that came first; ``None`` as long as none has.
        count: How many have come.
    """

    def __init__(self) -> None:
        self.first: str | None = None
        self.count = 0
        self._ending = _AT_WORK
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def listen(self) -> None:
        """Take the signals over from whoever has them; Ray takes SIGTERM while it starts."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python gives signals to the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._hear)
            self._before.setdefault(number, before)

    def finish(self) -> None:
        """Let the first signal pass from now on, and the second one end the command: nothing is left to be stopped."""
        self.listen()
        self._ending = _FINISHING

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.count += 1
        if self.count >= self._ending:
            raise SystemExit(BY_SIGNAL[name])
        self.first = self.first or name
        if self._ending == _FINISHING:
            os.write(2, _BORNE)  # print may be at work beneath this handler, and cannot be entered twice
