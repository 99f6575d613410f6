"""Worker groups from the driver's side: placement, start, loss and rebuilding, all of it Ray's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from xfuser.core.distributed.environment import accelerators_wanted
from xfuser.ray.batch.group import Group
from xfuser.ray.batch.work import Task
from xfuser.ray.cluster import ray
from xfuser.ray.rank import EngineSettings

PAUSE = 0.5  # seconds until a group that is not there yet is asked again
AHEAD = 2  # tasks that a group has: one that it generates, and one behind it


@dataclass
class Pending:
    """A call that is not answered yet.

    Attributes:
        group: Whose it is.
        what: ``room``, ``load``, ``learn`` or ``make``.
        task: What is learned from or made.
    """

    group: WorkerGroup
    what: str
    task: Task | None = None


@dataclass
class WorkerGroup:
    """One group: a placement group of Ray, and the actor in its first bundle.

    Attributes:
        number: From 0.
        placement: Ray's placement group.
        actor: Once there is room.
        loaded: Whether it takes tasks.
        tasks: What it has, the earliest first.
        loaded_at: When it first was.
        busy: Seconds of generating.
        batches: Done.
        images: Written.
        losses: How often it had to be built again, since its last success.
        rebuilt: How often it had to be, over all.
        load_seconds: Of the last loading.
        start_seconds: From the room that it was given to its first load, its processes' start included.
        placed_at: When it was given room.
        machine: Where it is.
        process: The first rank's.
        ask_at: When to ask it again, where it was not there.
        released_at: When it was let go.
    """

    number: int
    placement: Any
    actor: Any = None
    loaded: bool = False
    tasks: list[Task] = field(default_factory=list)
    loaded_at: float | None = None
    busy: float = 0.0
    batches: int = 0
    images: int = 0
    losses: int = 0
    rebuilt: int = 0
    load_seconds: float = 0.0
    start_seconds: float = 0.0
    placed_at: float | None = None
    machine: str = ""
    process: int = 0
    ask_at: float | None = None
    released_at: float | None = None

    def document(self) -> dict[str, Any]:
        """Sum the group up, in plain types."""
        alive = 0.0 if self.loaded_at is None else (self.released_at or time.time()) - self.loaded_at
        return {
            "group": self.number,
            "machine": self.machine,
            "process": self.process,
            "batches": self.batches,
            "images": self.images,
            "rebuilt": self.rebuilt,
            "load_seconds": self.load_seconds,
            "start_seconds": self.start_seconds,
            "busy_seconds": self.busy,
            "alive_seconds": alive,
            "idle_share": max(0.0, 1 - self.busy / alive) if alive else None,
        }


class Groups:
    """All groups of a job, and what the driver waits for from them.

    Args:
        settings: What each of them loads.
        folder: The job's.
        job: The job's own name.
        image_format: Of the files.
        most: How many groups are asked for. Those that Ray has no room for wait; an autoscaling cluster grows for them.
        cpus: Of each rank, where the cluster has no accelerator.
    """

    def __init__(
        self, settings: EngineSettings, folder: str, job: str, image_format: str, most: int, cpus: int
    ) -> None:
        self._settings = ray.put(settings)
        self._arguments = (folder, job, image_format)
        self._world = settings.parallel.world_size
        accelerators = accelerators_wanted(settings.device, bool(ray.cluster_resources().get("GPU")))
        asked: dict[str, float] = {"num_gpus": accelerators, "num_cpus": 1} if accelerators else {"num_cpus": cpus}
        self._options = asked
        self._pending: dict[Any, Pending] = {}
        bundle = {"GPU": float(accelerators), "CPU": 1.0} if accelerators else {"CPU": float(cpus)}
        self.all = [self._ask_for_room(number, bundle) for number in range(most)]

    def _ask_for_room(self, number: int, bundle: dict[str, float]) -> WorkerGroup:
        placed = placement_group([bundle] * self._world, strategy="PACK", name=f"xfuser-batch-{number}")
        group = WorkerGroup(number, placed)
        self._pending[placed.ready()] = Pending(group, "room")
        return group

    @property
    def alive(self) -> list[WorkerGroup]:
        """Groups that take tasks."""
        return [each for each in self.all if each.loaded]

    @property
    def at_work(self) -> bool:
        """Whether any group has a task."""
        return any(each.tasks for each in self.all)

    def wait(self, seconds: float) -> list[tuple[Any, Pending]]:
        """Wait until something is answered, at most for so long, and return what is."""
        for each in self.all:
            if each.ask_at is not None and time.monotonic() >= each.ask_at:
                each.ask_at = None
                self._load(each)
        if not self._pending:
            time.sleep(seconds)
            return []
        waited = list(self._pending)
        done, _ = ray.wait(waited, timeout=seconds)
        if done and len(waited) > 1:  # all that are there by now: a large cluster answers faster than one at a time
            done, _ = ray.wait(waited, num_returns=len(waited), timeout=0)
        return [(reference, self._pending.pop(reference)) for reference in done]

    def start(self, group: WorkerGroup) -> None:
        """Start the actor where there is room now."""
        group.placed_at = time.time()
        where = [
            PlacementGroupSchedulingStrategy(group.placement, placement_group_bundle_index=index)
            for index in range(self._world)
        ]
        remote = ray.remote(Group).options(
            **self._options,
            scheduling_strategy=where[0],
            max_restarts=-1,  # on the same machine, or, where that is gone, where Ray finds room
            max_concurrency=AHEAD + 1,
        )
        group.actor = remote.remote(group.number, *self._arguments, self._options, where[1:])
        self._load(group)

    def give(self, group: WorkerGroup, task: Task, call: Callable[[Any], Any]) -> None:
        """Hand a task to a group; ``call`` makes it of the actor."""
        group.tasks.append(task)
        self._pending[call(group.actor)] = Pending(group, "learn" if task.learns else "make", task)

    def note_loss(self, group: WorkerGroup) -> list[Task]:
        """Note that a group is gone, have it asked until Ray has built it anew, and return its tasks in their order."""
        tasks, group.tasks = group.tasks, []
        if group.loaded or tasks:
            group.rebuilt += 1
        group.loaded = False
        group.losses += 1
        self._pending = {key: each for key, each in self._pending.items() if each.group is not group}
        self.ask_later(group)
        return tasks

    def rebuild(self, group: WorkerGroup) -> list[Task]:
        """Have Ray start a group again whose ranks cannot go on, and return its tasks in their order."""
        ray.kill(group.actor, no_restart=False)
        return self.note_loss(group)

    def note_loaded(self, group: WorkerGroup, told: dict[str, Any]) -> None:
        """Note that a group takes tasks now."""
        now = time.time()
        if group.loaded_at is None:
            group.loaded_at, group.start_seconds = now, now - (group.placed_at or now)
        group.loaded = True
        group.load_seconds, group.machine, group.process = told["seconds"], told["machine"], told["process"]

    def ask_later(self, group: WorkerGroup) -> None:
        """Ask a group again that was not there."""
        group.ask_at = time.monotonic() + PAUSE

    def let_go(self, group: WorkerGroup) -> None:
        """Give a group's place back, which lets an autoscaling cluster shrink."""
        if group.released_at is None:
            group.released_at = time.time()
            group.loaded = False
            group.ask_at = None
            self._pending = {key: each for key, each in self._pending.items() if each.group is not group}
            if group.actor is not None:
                ray.kill(group.actor)
            remove_placement_group(group.placement)

    def close(self) -> None:
        """Let all groups go."""
        for each in self.all:
            self.let_go(each)

    def _load(self, group: WorkerGroup) -> None:
        self._pending[group.actor.load.remote(self._settings)] = Pending(group, "load")


def is_gone(error: BaseException) -> bool:
    """Whether an error says that the process or the machine is gone, and not what it has raised."""
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


def not_there_yet(error: BaseException) -> bool:
    """Whether a process is being started, and only has to be asked again."""
    return isinstance(error, ray.exceptions.ActorUnavailableError)


def resources_of(groups: Sequence[WorkerGroup]) -> str:
    """Tell what a group asks for and what the cluster has, in one line."""
    have = {name: count for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU")}
    wanted = groups[0].placement.bundle_specs
    return f"a group asks for {len(wanted)} x {wanted[0]}, and the cluster has {have}"
