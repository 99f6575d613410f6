"""When one rank fails, all of them stop, and each says why in a line."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from xfuser.core.distributed.environment import launched, rank, world_size

Result = TypeVar("Result")
_told = threading.Lock()

USAGE = (ValueError, TypeError, OSError)
GRACE = 5.0  # seconds that an orderly ending may take before it is cut short
# What torch raises where a peer is gone comes as plain RuntimeErrors too, told by these words.
_LOST = ("connection closed by peer", "connection reset", "gloo", "timed out waiting", "broken pipe", "nccl error")


class LostPeer(RuntimeError):
    """Another rank is gone, or has not answered in time."""


class Refused(ValueError):
    """What every rank refuses alike, before the work begins."""


class NotStarted(RuntimeError):
    """Some rank could not begin, so that none does."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a peer is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)


def one_line(error: BaseException) -> str:
    """The first line of an error's text, with its class where it is no plain refusal."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, (ValueError, OSError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def reason_of(error: BaseException) -> str:
    """What a communication library says of a lost peer, without the place in its source and its advice."""
    line = one_line(error).split(". This is typically", 1)[0]
    return line.split("] ", 1)[1] if line.startswith("[") and "] " in line else line


def begin_together(begin: Callable[[], Result]) -> Result:
    """Do on all ranks what comes before the work, and begin the work on all of them or on none.

    Raises:
        Refused: All ranks refuse for the same reason.
        NotStarted: Some rank could not begin; on every rank.
    """
    if not dist.is_initialized():
        return begin()
    result, problem = None, None
    try:
        result = begin()
    except Exception as error:
        problem = error
    told: list[str | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(told, None if problem is None else one_line(problem))
    except RuntimeError as error:
        raise LostPeer(f"lost contact with another rank before the first step: {reason_of(error)}") from error
    if problem is not None:
        if isinstance(problem, USAGE) and len(set(told)) == 1:
            raise Refused(one_line(problem)) from problem
        raise NotStarted(f"could not begin: {one_line(problem)}") from problem
    failed = [index for index, text in enumerate(told) if text is not None]
    if failed:
        raise NotStarted(f"stopped, since rank {failed[0]} could not begin: {told[failed[0]]}")
    return result  # type: ignore[return-value]


def decided_by_first(decide: Callable[[], Result]) -> Result:
    """Let the first rank decide what it alone can see (files that it writes), for all ranks. Collective.

    Raises:
        ValueError: The first rank refuses; on every rank, in its words.
    """
    if not dist.is_initialized():
        return decide()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = decide()
        except USAGE as error:
            told[1] = one_line(error)
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise ValueError(told[1])
    return told[0]


def tell(command: str, text: str) -> None:
    """Print one line of this rank's: the first that there is, since what follows is a consequence."""
    if _told.acquire(blocking=False):
        print(f"{command}: rank {rank()}: {text}", file=sys.stderr, flush=True)


def watch(command: str) -> None:
    """End this process in order when its launcher asks it to, also while it waits for a peer.

    Python's own handlers run between operations, and a rank that waits for a dead one is inside an operation; so a
    thread hears of the signal, says so, and cuts the ending short where it takes long. To be called in the main thread.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _unwind)
    threading.Thread(target=_listen, args=(command, reading), daemon=True).start()


def _listen(command: str, reading: int) -> None:
    while signal.SIGTERM not in os.read(reading, 16):
        pass
    by_launcher = "TORCHELASTIC_RUN_ID" in os.environ
    tell(command, "stopped by the launcher after another rank failed" if by_launcher else "stopped by SIGTERM")
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _unwind(*unused: Any) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def end(command: str, error: BaseException) -> NoReturn:
    """Say in one line what went wrong and leave: with 2 where the command was wrong, with 1 where the work failed.

    What all ranks refuse alike, the first one says for all. An error of a single process that is no refusal is raised
    again.
    """
    joined = dist.is_initialized()
    if isinstance(error, USAGE) and (not joined or isinstance(error, Refused)):
        if rank() == 0:
            print(f"{command}: {one_line(error)}", file=sys.stderr, flush=True)
        elif world_size() > 1:
            _told.acquire(blocking=False)  # nor is there anything to say when the launcher stops this one
            time.sleep(GRACE)  # a launcher stops all when one has ended, and the first rank has a line to say
        _leave(2, joined)
    if not launched() or world_size() == 1:
        raise error
    if is_lost(error) and not isinstance(error, LostPeer):
        error = LostPeer(f"lost contact with another rank: {reason_of(error)}")
    tell(command, one_line(error))
    _leave(1, joined)


def finish() -> None:
    """Leave a job of several processes whose work is done; a process that is alone goes on.

    Python's own ending was seen to abort, seldom, while threads of the communication library were still there.
    """
    if dist.is_initialized():
        dist.barrier()
        _leave(0, True)


def _leave(code: int, joined: bool) -> NoReturn:
    if not joined:
        raise SystemExit(code)
    # Peers that wait for this process learn of its end from their connections; parting in order would wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
