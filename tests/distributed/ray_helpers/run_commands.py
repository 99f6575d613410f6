"""Runs `xdit` commands one after another in this process, which takes seconds to import what they need.

python run_commands.py COMMANDS.json        a list of {"arguments": [...], "kill": raylets, "terminate": raylets}

With "kill", a group's process of one of these raylets is killed; with "terminate", this one is asked to end while such
a process generates.

Leaves beside it COMMANDS.ended.json: of each command its exit code and what it wrote.
"""

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

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


def main() -> None:
    listed = Path(sys.argv[1])
    ended = []
    for command in json.loads(listed.read_text()):
        killed: list[int] = []
        if command.get("kill"):
            arguments = (command["kill"], Path(command["folder"]), killed)
            threading.Thread(target=kill_one, args=arguments, daemon=True).start()
        if command.get("terminate"):
            threading.Thread(target=terminate_this, args=(command["terminate"],), daemon=True).start()
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main(command["arguments"])
            except SystemExit as left:
                code = left.code
        ended.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "killed": killed})
    listed.with_suffix(".ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
