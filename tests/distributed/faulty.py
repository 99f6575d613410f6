"""`xdit generate`, with a rank that fails in mid-step: faulty.py HOW RANK arguments …

HOW is ``raise``, ``kill``, ``stop`` (it stands still) or ``load`` (it cannot begin). A file named in XFUSER_FAULT_FILE
is told when it happens.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

STEP = 2


def main() -> None:
    how, failing, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    if int(os.environ["RANK"]) == failing:
        break_it(how)
    from xfuser.cli import main as command

    command(["generate", *arguments])


def break_it(how: str) -> None:
    import xfuser.model_executor.pipelines as pipelines

    if how == "load":
        pipelines.load_pipeline = fail
        return
    from diffusers.models.attention import BasicTransformerBlock

    original, calls = BasicTransformerBlock.forward, 0

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12 * STEP + 3:
            Path(os.environ["XFUSER_FAULT_FILE"]).write_text(str(time.time()))
            if how == "raise":
                fail()
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return original(self, *args, **kwargs)

    BasicTransformerBlock.forward = forward  # type: ignore[method-assign]


def fail(*unused: Any) -> None:
    raise RuntimeError("the fault of this test\nand a second line")


if __name__ == "__main__":
    main()
