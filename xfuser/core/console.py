"""What a command line says, and what it leaves unsaid."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Let diffusers and transformers show errors only, unless the user has set their verbosity.

    To be called before either is imported.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
