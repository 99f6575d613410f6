"""How a command ends that cannot go on: with one line, which speaks of flags."""

from __future__ import annotations

from typing import NoReturn

from xfuser.config.flags import in_flags
from xfuser.core.distributed.shutdown import USAGE, end


def stop(command: str, error: Exception) -> NoReturn:
    """Say in one line what went wrong, with settings named as flags, and leave as `failing.end` does."""
    said = in_flags(str(error))
    if said != str(error):
        if type(error).__module__.startswith("xfuser."):
            error = type(error)(said)  # its class decides how the command ends
        elif isinstance(error, USAGE):
            error = ValueError(said)
    end(command, error)
