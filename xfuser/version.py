"""The installed version. Looked up on first use: reading a package's metadata takes as long as all of `xdit --help`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("xfuser")
except PackageNotFoundError:
    __version__ = "0+source"
