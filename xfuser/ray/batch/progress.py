"""What a person sees while a job runs."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from xfuser.ray.batch.job import State

LINE_SECONDS = 30.0  # between two lines, where nobody looks at a terminal


class Screen:
    """A bar with what matters of a job, in a terminal; a line now and then elsewhere.

    Args:
        total: Images of the job.
        done: Those that were there before.
    """

    def __init__(self, total: int, done: int) -> None:
        columns = (
            TextColumn("images"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
        )
        self._console = Console(file=sys.stderr)
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("images", total=total, completed=done, said="")
        self._began = self._line = time.monotonic()
        self._before = done
        self._said_stopping = False

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, state: State) -> None:
        """Show how a job stands."""
        if state.stopping and not self._said_stopping:
            self._said_stopping = True
            self._console.print(f"xdit batch: {state.stopping}; once more ends it now", highlight=False, soft_wrap=True)
        seconds = time.monotonic() - self._began
        rate = (state.done - self._before) / seconds if seconds > 0 else 0.0
        share = "" if state.share is None else f"evaluated {state.share:.0%} · "
        said = f"{rate:.2f}/s · {share}groups {state.alive} · retries {state.retries} · rejected {state.rejected}"
        self._bar.update(self._task, completed=state.done, said=said)
        if not self._console.is_terminal and time.monotonic() - self._line >= LINE_SECONDS:
            self._line = time.monotonic()
            left = f", {(state.total - state.done) / rate / 60:.0f} minutes left" if rate else ""
            print(f"{state.done} of {state.total} images · {said}{left}", file=sys.stderr, flush=True)
