"""What a command line says, and what it leaves unsaid."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def quiet_libraries() -> None:
    """Let diffusers and transformers show errors only, unless the user has set their verbosity.

    To be called before either is imported.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


def check_output_folder(path: Path, flag: str = "--output_dir") -> None:
    """Refuse early a folder in which results could not be written later, and leave nothing behind.

    Raises:
        NotADirectoryError: There is a file in its place.
        PermissionError: Nothing can be created there.
    """
    folder = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{flag}: {folder} is a file; name a folder")
    try:
        # Permissions do not tell it all: a file system may be read-only, or take no files.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".xdit"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise PermissionError(f"{flag}: nothing can be written in {folder} ({reason}); name another folder") from error
