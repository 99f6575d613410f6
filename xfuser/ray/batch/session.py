"""Ray for as long as one command runs: an embedded one that goes with it, or a user's cluster that stays as it was."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from xfuser.core.distributed.shutdown import NotStarted

MARK = "XFUSER_BATCH_SESSION"
_ENDING_SECONDS = 20.0
_STARTS = 3
# Run by `python -c`: is told processes, a line each: [pid, when it began]. Waits until its parent is gone, however that
# ended, and ends those processes, and whatever bears the parent's mark in its environment.
_KEEPER = """
import json, os, sys, time
import psutil
name, mark, told = sys.argv[1], sys.argv[2], []
for line in sys.stdin:
    told.append(tuple(json.loads(line)))

def is_left(each):
    try:
        marked = (each.pid, each.create_time()) in told or each.environ().get(name) == mark
        return marked and each.pid != os.getpid() and each.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False

for _ in range(50):
    left = [each for each in psutil.process_iter() if is_left(each)]
    if not left:
        break
    for each in left:
        try:
            each.kill()
        except psutil.Error:
            pass
    time.sleep(0.1)
"""


def prepare(address: str | None) -> None:
    """Settle what Ray reads while it is imported: for an embedded one, that nobody else may give it work."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_py_gcs_connect_timeout_s", "120")  # a busy machine is slow, and not gone
    if address is None:
        # Ray's own 15 would have every other program on the machine go first.
        os.environ.setdefault("RAY_worker_niceness", "0")
    if address is None and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})


@contextmanager
def ray_session(address: str | None, ranks: int, cpus_per_rank: int) -> Iterator[None]:
    """Connect to a cluster, or start Ray on this machine for as long as the block lasts.

    Args:
        address: Of a cluster; ``None`` starts an embedded Ray, of which nothing is left behind, also where this
            process is killed.
        ranks: Processes that will be asked for at least.
        cpus_per_rank: Of the machine, where it has no accelerator.

    Raises:
        ValueError: There is no cluster at the address.
        NotStarted: Ray cannot be started here.
    """
    keeper = None
    if address is None:
        # What Ray starts inherits the mark. Its own agents outlive a killed driver by minutes otherwise.
        mark = os.environ[MARK] = secrets.token_hex(16)
        keeper = _start_keeper(mark)
    try:
        _connect(address, ranks * cpus_per_rank)
        if keeper is not None:
            _tell(keeper)
        yield
    finally:
        import ray

        ray.shutdown()
        if keeper is not None:
            del os.environ[MARK]
            _dismiss(keeper)


def _connect(address: str | None, cpus: int) -> None:
    """Connect, or start; once more where a busy machine was slower than Ray waits."""
    import ray

    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if address is None:
        settings |= {"address": "local", "include_dashboard": False, "num_cpus": max(cpus, os.cpu_count() or 1)}
    else:
        settings["address"] = address
    for tries_left in range(_STARTS - 1, -1, -1):
        try:
            ray.init(**settings)
            return
        except Exception as error:  # Ray raises plain ones here
            ray.shutdown()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, (ConnectionError, ValueError)) and address is not None:
                raise ValueError(f"--ray_address {address}: no Ray cluster answers there ({reason})") from error
            if not tries_left:
                where = "on this machine" if address is None else f"with --ray_address {address}"
                raise NotStarted(f"Ray could not be started {where}: {reason}") from error


def _start_keeper(mark: str) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(
        [sys.executable, "-c", _KEEPER, MARK, mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # a Ctrl-C in the terminal is not for it
    )


def _tell(keeper: subprocess.Popen[bytes]) -> None:
    """Name the processes that Ray consists of: some write over their environment, and so over the mark."""
    import psutil

    pipe = keeper.stdin
    assert pipe is not None
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if each.pid != keeper.pid:
                pipe.write(json.dumps([each.pid, each.create_time()]).encode() + b"\n")
    pipe.flush()


def _dismiss(keeper: subprocess.Popen[bytes]) -> None:
    """Let it end what is left, and wait for that."""
    pipe: IO[bytes] | None = keeper.stdin
    assert pipe is not None
    pipe.close()
    end = time.monotonic() + _ENDING_SECONDS
    while keeper.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
