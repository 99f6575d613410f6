"""Runs `xdit` commands one after another in this process, which takes seconds to import what they need.

python run_commands.py COMMANDS.json [HOOK]
    a list of {"arguments": [...], "kill": raylets, "terminate": raylets, "metrics": URL}

With "kill", a group's process of one of these raylets is killed; with "terminate", this one is asked to end while such
a process generates; with "metrics", what is there is read all the time. HOOK names a function, as module.function, that
every process of Ray's begins with.

Leaves beside it COMMANDS.ended.json: of each command its exit code, what it wrote, and the last of each metric.
"""

import contextlib
import functools
import io
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import ray

from xfuser import cli


def kill_one(raylets: list[int], folder: Path, killed: list[int]) -> None:
    """Kill the process that is generating, once a first batch is done."""
    while not any(path.stat().st_size for path in folder.glob("manifest/*.jsonl")):
        time.sleep(0.02)
    for raylet in raylets:
        for each in psutil.Process(raylet).children():
            if each.name().startswith("ray::Group"):
                os.kill(each.pid, signal.SIGKILL)
                killed.append(each.pid)
                return


def terminate_this(raylets: list[int]) -> None:
    """Send this process SIGTERM while a group generates."""
    while True:
        for raylet in raylets:
            for each in psutil.Process(raylet).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "".join(each.cmdline()).startswith("ray::Group.make"):
                        os.kill(os.getpid(), signal.SIGTERM)
                        return
        time.sleep(0.02)


def read_metrics(url: str, seen: dict[str, float]) -> None:
    """Read what Ray's endpoint says of batch jobs, again and again; the last value of each is kept."""
    while True:
        with contextlib.suppress(OSError):  # it comes a while after the nodes, and not at all without ray[default]
            with urllib.request.urlopen(url, timeout=10) as answer:
                for line in answer.read().decode().splitlines():
                    if line.startswith("ray_xfuser_batch_"):
                        name, value = line.rsplit(" ", 1)
                        group = re.search(r'group="(\d+)"', name)
                        bound = re.search(r'le="([^"]+)"', name)
                        key = [name.split("{")[0], *(found[1] for found in (group, bound) if found)]
                        seen[" ".join(key)] = float(value)
        time.sleep(0.3)


def main() -> None:
    listed = Path(sys.argv[1])
    if len(sys.argv) > 2:
        ray.init = functools.partial(ray.init, runtime_env={"worker_process_setup_hook": sys.argv[2]})
    ended = []
    for command in json.loads(listed.read_text()):
        killed: list[int] = []
        seen: dict[str, float] = {}
        if command.get("kill"):
            arguments = (command["kill"], Path(command["folder"]), killed)
            threading.Thread(target=kill_one, args=arguments, daemon=True).start()
        if command.get("metrics"):
            threading.Thread(target=read_metrics, args=(command["metrics"], seen), daemon=True).start()
        if command.get("terminate"):
            threading.Thread(target=terminate_this, args=(command["terminate"],), daemon=True).start()
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main(command["arguments"])
            except SystemExit as left:
                code = left.code
        ended.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "killed": killed, "seen": dict(seen)})
    listed.with_suffix(".ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
