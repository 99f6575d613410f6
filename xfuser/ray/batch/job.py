"""The driver: keeps all groups busy until nothing is left, and loses nothing when one of them is."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from xfuser.core.distributed.shutdown import one_line
from xfuser.ray.batch.batches import Batch, Plan
from xfuser.ray.batch.folder import JobFolder, write_rejected
from xfuser.ray.batch.group import Made, NeedsHalves, NoRoom, NotShared, TooLarge
from xfuser.ray.batch.groups import AHEAD, Groups, Pending, WorkerGroup, is_gone, not_there_yet, resources_of
from xfuser.ray.batch.manifest import finished_places
from xfuser.ray.batch.metrics import JobMetrics
from xfuser.ray.batch.prompts import Rejected
from xfuser.ray.batch.stopping import StopRequests
from xfuser.ray.batch.work import Task, Work
from xfuser.ray.cluster import cause_of, ray
from xfuser.ray.rank import EngineSettings

TICK = 0.2  # seconds between two looks at signals and the clock
SAMPLES = 5000  # batches whose seconds a summary lists


class Stopped(Exception):
    """The job cannot go on; what was made is there, and the same command goes on from it.

    Args:
        reason: Why, in one line.
        signal: The signal that has asked for it, where one has.
    """

    def __init__(self, reason: str, signal: str | None = None) -> None:
        super().__init__(reason)
        self.signal = signal


@dataclass(frozen=True)
class Limits:
    """How a job runs, and what it bears.

    Args:
        fewest: Groups without which it does not go on for longer than ``timeout``.
        most: Groups that it asks for.
        max_attempts: Tries of a batch, and then of each of its images.
        grace: Seconds that work in flight is given when the job is asked to stop.
        timeout: Seconds that a group is waited for.
        calibration_images: Of a kind's first batch, that its calibration is learned from.
        cpus: Of a rank, where there is no accelerator.
    """

    fewest: int = 1
    most: int = 1
    max_attempts: int = 3
    grace: float = 30.0
    timeout: float = 600.0
    calibration_images: int = 4
    cpus: int = 1


@dataclass
class State:
    """How a job stands, for those who look at it."""

    total: int
    done: int = 0
    made: int = 0
    retries: int = 0
    rejected: int = 0
    alive: int = 0
    evaluated: float = 0.0
    batch_seconds: list[float] = field(default_factory=list)
    write_seconds: list[float] = field(default_factory=list)
    manifest_bytes: int = 0
    learn_seconds: float = 0.0
    driver_seconds: float = 0.0  # of a processor, in rounds of the loop that had an answer
    stopping: str = ""  # what it is asked to stop by, and how long that takes

    @property
    def share(self) -> float | None:
        """Of the denoiser's work, that this run's images took."""
        return self.evaluated / self.made if self.made else None


class Job:
    """One run of a job: from what is missing to nothing, or to where it was stopped.

    Args:
        folder: The job's.
        plan: All requests.
        settings: What each group loads.
        limits: How it runs.
        rejected: Lines that nothing could be made of.
        show: Called with the state, some times a second.
        image_format: Of the files.
        stops: What asks it to stop.
    """

    def __init__(
        self,
        folder: JobFolder,
        plan: Plan,
        settings: EngineSettings,
        limits: Limits,
        rejected: list[Rejected],
        show: Callable[[State], None],
        image_format: str,
        stops: StopRequests,
    ) -> None:
        self._stops = stops
        self._folder, self._plan, self._limits, self._show = folder, plan, limits, show
        self.settings, self._format = settings, image_format
        self.rejected = rejected
        self._done = finished_places(folder.path, plan)
        self._todo = [each for each in plan.batches() if not all(self._done[place] for place in each.members)]
        self.state = State(len(plan), sum(self._done), rejected=len(rejected))
        self._fatal: Exception | None = None
        self._halved: set[int] = set()
        self._too_large: dict[int, str] = {}
        self.groups: list[dict[str, Any]] = []

    @property
    def left(self) -> int:
        """Batches of which an image is missing."""
        return len(self._todo)

    def run(self) -> None:
        """Do what is missing.

        Raises:
            Stopped: It was asked to stop before all was done, or cannot go on; what was made is there.
            ValueError: A group refuses the model or the settings.
        """
        self._stops.listen()
        known = self._folder.calibrations(self._plan)
        self._calibrations = {kind: ray.put(files) for kind, files in known.items()}
        self._work = Work(self._todo, self._limits.max_attempts, self.settings.learns, known)
        self._metrics = JobMetrics()
        most = min(self._limits.most, len(self._todo))
        self._groups = Groups(
            self.settings, str(self._folder.path), self._folder.job, self._format, most, self._limits.cpus
        )
        self._short_since = time.monotonic()
        try:
            self._loop()
        finally:
            self.groups = [each.document() for each in self._groups.all]
            self._groups.close()
            write_rejected(self._folder.path, self.rejected)
        if self._fatal is not None:
            raise self._fatal
        if not self._work.over:
            raise Stopped(f"stopped by {self._stops.first}", self._stops.first)

    def _loop(self) -> None:
        ends = None
        while not self._work.over:
            began = time.thread_time()
            if self._fatal is not None or self._stops.first is not None:
                now = time.monotonic()
                grace = 0 if self._fatal is not None or self._stops.count > 1 else self._limits.grace
                ends = min(now + grace, ends or now + grace)
                if not self._groups.at_work or now >= ends:
                    return
            else:
                self._hand_out()
                self._check_enough()
            answers = self._groups.wait(TICK)
            for reference, pending in answers:
                self._answer(reference, pending)
            self._tell()
            if answers:  # rounds in which nothing comes cost nobody anything
                self.state.driver_seconds += time.thread_time() - began

    # -- handing out --------------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        for ahead in range(1, AHEAD + 1):  # one for each group first
            for group in self._groups.alive:
                # Behind the last batches nobody waits while another group has two.
                few = ahead > 1 and self._work.left < len(self._groups.alive)
                if len(group.tasks) >= ahead or few:
                    continue
                task = self._work.next()
                if task is None:
                    break
                self._give(group, task)
        if not self._work.left:
            for group in self._groups.alive:
                if not group.tasks and len(self._groups.alive) > 1:
                    self._groups.let_go(group)

    def _give(self, group: WorkerGroup, task: Task) -> None:
        batch = task.batch
        members = batch.members[: self._limits.calibration_images] if task.learns else batch.members
        requests = self._plan.requests(members)
        if batch.kind in self._too_large:
            self._work.done(task)
            self._reject(batch, batch.members, self._too_large[batch.kind], task.attempt)
            return
        if task.learns:
            self._learning_since = time.monotonic()
            self._groups.give(group, task, lambda actor: actor.learn.remote(requests))
            return
        learned = [self._calibrations[batch.kind]] if batch.kind in self._calibrations else []
        self._groups.give(
            group,
            task,
            lambda actor: actor.make.remote(
                batch.number, batch.members, requests, task.attempt, learned, batch.kind in self._halved
            ),
        )

    def _check_enough(self) -> None:
        """Stop where fewer groups are there than have to be, for too long."""
        if len([each for each in self._groups.all if each.loaded or each.released_at]) >= min(
            self._limits.fewest, len(self._groups.all)
        ):
            self._short_since = time.monotonic()
        elif time.monotonic() - self._short_since > self._limits.timeout:
            self._fatal = Stopped(
                f"{len(self._groups.alive)} of at least {self._limits.fewest} groups came up within --timeout "
                f"{self._limits.timeout:g} seconds: {resources_of(self._groups.all)}; ask for fewer --groups"
            )

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, reference: Any, pending: Pending) -> None:
        group, task = pending.group, pending.task
        if task is not None and task not in group.tasks:
            return  # the group was given up by an answer that came with this one
        try:
            result = ray.get(reference)
        except (ray.exceptions.RayError, ValueError, RuntimeError, OSError) as error:
            self._failed(group, pending, error)
            return
        if pending.what == "room":
            self._groups.start(group)
            return
        group.losses = 0
        if pending.what == "load":
            self._groups.note_loaded(group, result)
            return
        assert task is not None
        group.tasks.remove(task)
        self._work.done(task)
        if task.learns:
            self._keep(task.batch.kind, result)
        else:
            self._count(group, task.batch, result)

    def _keep(self, kind: int, files: dict[str, bytes]) -> None:
        self.state.learn_seconds += time.monotonic() - self._learning_since
        self._folder.keep_calibration(self._plan.kinds[kind], files)
        self._calibrations[kind] = ray.put(files)

    def _count(self, group: WorkerGroup, batch: Batch, made: Made) -> None:
        for place in batch.members:
            self.state.done += not self._done[place]
            self._done[place] = 1
        group.busy += made.seconds
        group.batches += 1
        group.images += made.images
        state = self.state
        state.made += made.images
        state.evaluated += made.evaluated_share * made.images
        state.manifest_bytes += made.manifest_bytes
        if len(state.batch_seconds) < SAMPLES:
            state.batch_seconds.append(made.seconds)
            state.write_seconds.append(made.writing)

    def _failed(self, group: WorkerGroup, pending: Pending, error: BaseException) -> None:
        cause = cause_of(error)
        if is_gone(error):
            if pending.what == "load" and not_there_yet(error):
                self._groups.ask_later(group)
                return
            self._lose(group, cause)
            return
        task = pending.task
        if isinstance(cause, NoRoom):
            self._fatal = Stopped(f"{cause.strerror}; make room, and run the same command again")
        elif (
            isinstance(cause, NotShared)
            or pending.what in ("load", "learn")
            and isinstance(cause, (ValueError, TypeError))
        ):
            self._fatal = ValueError(one_line(cause))
        elif task is None:
            self._fatal = Stopped(f"group {group.number} cannot load: {one_line(cause)}")
        else:
            group.tasks.remove(task)
            if isinstance(cause, (MemoryError, TooLarge)) and self.settings.parallel.world_size > 1:
                for behind in reversed(self._groups.rebuild(group)):
                    self._work.hand_back(behind)
            if isinstance(cause, NeedsHalves):
                self._halved.add(task.batch.kind)
                self._work.hand_back(task)
            elif isinstance(cause, TooLarge) and not task.alone:
                self._too_large[task.batch.kind] = one_line(cause)
                self._work.done(task)
                self._reject(task.batch, task.batch.members, one_line(cause), task.attempt)
            else:
                self._try_again(task, one_line(cause))

    def _lose(self, group: WorkerGroup, cause: BaseException) -> None:
        """Have a group built again. Only what it was at is blamed; what waited behind that was not tried."""
        tasks = self._groups.note_loss(group)
        reason = f"the group was lost ({one_line(cause)})"
        for task in tasks[:1]:
            self._try_again(task, reason)
        for task in tasks[1:]:
            self._work.hand_back(task)
        if not tasks and group.losses > self._limits.max_attempts:
            self._groups.let_go(group)
            if all(each.released_at for each in self._groups.all):
                self._fatal = Stopped(f"no group can be kept alive: {reason}")

    def _try_again(self, task: Task, reason: str) -> None:
        given_up = self._work.failed(task)
        if task.learns and given_up:
            self._fatal = Stopped(f"no calibration could be learned: {reason}")
        elif given_up:
            self._reject(task.batch, given_up, reason, task.attempt)

    def _reject(self, batch: Batch, places: tuple[int, ...], reason: str, attempts: int) -> None:
        missing = [place for place in places if not self._done[place]]
        for request in self._plan.requests(missing):
            self.rejected.append(Rejected(request.file, request.line, reason, request.id, attempts))
        write_rejected(self._folder.path, self.rejected)

    # -- looking on ---------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        state = self.state
        state.retries, state.rejected, state.alive = self._work.retries, len(self.rejected), len(self._groups.alive)
        if self._stops.first is not None:
            state.stopping = f"{self._stops.first}: what is in flight has {self._limits.grace:g} seconds (--grace)"
        self._metrics.state(state.alive, state.total - state.done, state.retries, state.rejected)
        self._show(state)


def cpu_seconds() -> float:
    """Read how many seconds of a processor this process has taken."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
