"""What is left to do, what is tried again, and what is given up. Knows nothing of Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from xfuser.ray.batch.batches import Batch


@dataclass(frozen=True)
class Task:
    """One try at a batch, or at learning its kind's calibration first.

    Attributes:
        batch: What is to be made.
        attempt: From 1, and on from there where its images are tried one by one.
        alone: Whether this is one image of a batch that has failed every time.
        learns: Whether nothing is made, and the calibration of its kind is learned from its images.
    """

    batch: Batch
    attempt: int = 1
    alone: bool = False
    learns: bool = False


class Work:
    """Hands out batches in order. What has failed comes first again, so that nothing is left for the end.

    Args:
        batches: In order.
        max_attempts: How often a batch is tried, and then each of its images.
        learns: Whether the images of a kind need a calibration that has to be learned.
        known: Kinds whose calibration is there already.
    """

    def __init__(self, batches: Sequence[Batch], max_attempts: int, learns: bool, known: Iterable[int] = ()) -> None:
        self._batches, self._max, self._learns = deque(batches), max_attempts, learns
        self._again: deque[Task] = deque()
        self._known, self._learning = set(known), set()
        self._held: dict[int, list[Task]] = {}
        self.given_out = 0
        self.retries = 0

    def next(self) -> Task | None:
        """Hand out a task; ``None`` where nothing can be begun now."""
        while True:
            task = self._again.popleft() if self._again else self._fresh()
            if task is None:
                return None
            kind = task.batch.kind
            if not self._learns or task.learns or kind in self._known:
                break
            self._held.setdefault(kind, []).append(task)
            if kind not in self._learning:
                self._learning.add(kind)
                task = Task(task.batch, learns=True)
                break
        self.given_out += 1
        return task

    def done(self, task: Task) -> None:
        """Note that a task has succeeded."""
        self.given_out -= 1
        if task.learns:
            kind = task.batch.kind
            self._known.add(kind)
            self._again.extend(self._held.pop(kind, ()))

    def hand_back(self, task: Task) -> None:
        """Take a task back that was not tried."""
        self.given_out -= 1
        self._again.appendleft(task)

    def failed(self, task: Task) -> tuple[int, ...]:
        """Note that a try has failed, and return the requests that are given up with it."""
        self.given_out -= 1
        if task.attempt < self._max * (2 if task.alone else 1):
            self.retries += 1
            self._again.appendleft(replace(task, attempt=task.attempt + 1))
            return ()
        if task.learns or task.alone or len(task.batch.members) == 1:
            return task.batch.members
        self.retries += 1
        alone = [replace(task.batch, members=(place,)) for place in task.batch.members]
        self._again.extendleft(Task(each, task.attempt + 1, alone=True) for each in reversed(alone))
        return ()

    @property
    def left(self) -> int:
        """Tasks that are still to be handed out, unless something fails."""
        return len(self._batches) + len(self._again) + sum(map(len, self._held.values()))

    @property
    def over(self) -> bool:
        """Whether nothing is left, and nothing is being done."""
        return not self.left and not self.given_out

    def _fresh(self) -> Task | None:
        return Task(self._batches.popleft()) if self._batches else None
