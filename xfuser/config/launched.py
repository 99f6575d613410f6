"""Which process of a job this is, as the launcher has told it. Needs no torch, so that a command can speak at once."""

from __future__ import annotations

import os

LAUNCHED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, has started this process."""
    return all(name in os.environ for name in LAUNCHED_BY)


def world_size() -> int:
    """Processes of this job, before any of them has been contacted."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
