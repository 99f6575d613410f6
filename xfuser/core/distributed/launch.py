"""Starts the processes of a job on this machine, as torchrun does."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def start_processes(processes: int, arguments: Sequence[str], script: Path | None = None) -> int:
    """Run this many processes of a script, or of the ``xdit`` command, and wait for them.

    For several hosts, start torchrun on each of them instead.

    Args:
        processes: How many.
        arguments: Of the script or the command.
        script: A Python file; by default ``xfuser.cli``.

    Returns:
        The exit code: 0, or that of the rank that failed first (1 where a signal ended it).
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Each rank says what went wrong with it; torchrun's own account of it would bury that.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    what = ["-m", "xfuser.cli"] if script is None else [str(script)]
    options = parse_args(["--standalone", f"--nproc_per_node={processes}", *what, *arguments])
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"xdit: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
            return 1
        return failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
