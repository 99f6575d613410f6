"""Ray's side of a job: where its processes may run, starting them, and waiting for what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    import ray
except ModuleNotFoundError as error:
    raise ImportError('this needs Ray; install it with: pip install "xfuser[ray]"') from error

GRACE_SECONDS = 10.0  # for the other processes to end a call that one of them has failed in


def connect(processes: int) -> int:
    """Meet the Ray cluster; without one, start Ray on this machine.

    Args:
        processes: How many are going to be started.

    Returns:
        Accelerators that each of them gets: 1, or 0 where the cluster has none.

    Raises:
        ValueError: Fewer accelerators are free than processes are wanted.
    """
    if not ray.is_initialized():
        ray.init()
    present = int(ray.cluster_resources().get("GPU", 0))
    if not present:
        return 0
    free = int(ray.available_resources().get("GPU", 0))
    if free < processes:
        raise ValueError(
            f"{processes} processes need as many GPUs, and Ray has {free} of {present} free; choose smaller degrees"
        )
    return 1


def start_processes(kind: type, number: int, accelerators: int) -> list[Any]:
    """Start actors of a class, let them know each other's address, and number them. They have not met yet."""
    remote = ray.remote(num_cpus=0, num_gpus=accelerators)(kind)
    actors = [remote.remote() for _ in range(number)]
    address, port = ray.get(actors[0].meeting_place.remote())
    collect([each.place.remote(rank, number, address, port) for rank, each in enumerate(actors)], actors)
    return actors


def collect(calls: Sequence[Any], actors: Sequence[Any]) -> list[Any]:
    """Wait for a call that was made on every process, and give the results in their order.

    Where one fails, the others have a moment to fail alike; whichever then still waits for it is ended, since nothing
    else would end it.

    Raises:
        Exception: The first failure, as the process itself raised it.
    """
    waiting = list(calls)
    while waiting:
        done, waiting = ray.wait(waiting)
        try:
            ray.get(done)
        except ray.exceptions.RayError as failure:
            if waiting and ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_SECONDS)[1]:
                end_processes(actors)
            cause = getattr(failure, "cause", None)
            if isinstance(cause, Exception):
                raise cause from failure
            raise
    return ray.get(list(calls))


def end_processes(actors: Sequence[Any]) -> None:
    """End processes that `start_processes` has started."""
    for each in actors:
        ray.kill(each)


def cause_of(error: BaseException) -> BaseException:
    """Unwrap what a call has raised where it ran; Ray's own error where the process is gone."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, BaseException) else error
