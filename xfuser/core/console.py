"""What a command line says, and what it leaves unsaid."""

from __future__ import annotations

import os
from pathlib import Path


def quiet_libraries() -> None:
    """Let diffusers and transformers show errors only, unless the user has set their verbosity.

    To be called before either is imported.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


def check_output_folder(path: Path, flag: str = "--output_dir") -> None:
    """Raise NotADirectoryError early where results could not be written later."""
    for folder in (path, *path.parents):
        if folder.exists():
            if not folder.is_dir():
                raise NotADirectoryError(f"{flag}: {folder} is a file; name a folder")
            return
