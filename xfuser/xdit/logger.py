"""xDiT's way to get a logger."""

from __future__ import annotations

import logging


def init_logger(name: str) -> logging.Logger:
    """Return Python's logger of this name; level and handlers are the program's own to choose."""
    return logging.getLogger(name)
