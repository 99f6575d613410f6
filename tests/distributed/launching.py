"""Starts commands as their users do: in processes of their own, with a time limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
GENERATE = ROOT / "scripts" / "generate.py"


@dataclass
class Ended:
    """How a process ended: exit code, output, error output, and the seconds since the start of all."""

    code: int
    out: str
    err: str
    seconds: float

    def lines(self) -> list[str]:
        """What the command itself said on the error output."""
        return [line for line in self.err.splitlines() if line.startswith("xdit")]


def environment(**more: str) -> dict[str, str]:
    """One thread, this checkout, no process group around."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"} | more


def run(*arguments: str | Path, limit: float = 300, **more: str) -> Ended:
    """Python with these arguments, to its end."""
    return wait([start(*arguments, **more)], limit)[0]


def torchrun(processes: int, *arguments: str | Path, limit: float = 300) -> Ended:
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *arguments, limit=limit)


def by_hand(processes: int, *arguments: str | Path, limit: float = 300, awaited: int | None = None) -> list[Ended]:
    """The processes of a job without a launcher that looks after them; only the first ``awaited`` need to end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [start(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **job) for rank in range(processes)]
    return wait(ranks, limit, awaited)


def start(*arguments: str | Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(processes: list[subprocess.Popen[str]], limit: float, awaited: int | None = None) -> list[Ended]:
    begin = time.monotonic()
    ended = []
    try:
        for process in processes[:awaited]:
            out, err = process.communicate(timeout=max(1.0, begin + limit - time.monotonic()))
            ended.append(Ended(process.returncode, out, err, time.monotonic() - begin))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return ended
