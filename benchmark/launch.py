"""Starts a Python program as several processes with torchrun's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launch(
    module: str,
    processes: int,
    arguments: Sequence[str],
    timeout: float | None = None,
    log: Path | None = None,
) -> int:
    """Run a module of this checkout as so many processes, and return the launcher's exit code.

    Args:
        module: Dotted name; it finds rank and world in torchrun's environment, also where it is the only process.
        processes: How many.
        arguments: Its command line.
        timeout: Seconds after which the processes are ended, and the code is 124.
        log: Where what they print goes; by default to this process's own output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["--module", module, *arguments]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with ExitStack() as stack:
        output = stack.enter_context(log.open("w", encoding="utf-8")) if log else None
        errors = subprocess.STDOUT if log else None
        process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=output, stderr=errors))
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            # The launcher hands this on to the processes that it started.
            process.terminate()
            process.wait()
            return 124
        except BaseException:
            process.terminate()
            raise
