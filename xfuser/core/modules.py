"""What torch puts around a module."""

from __future__ import annotations

from typing import Any


def uncompiled(module: Any) -> Any:
    """Find the module that `torch.compile` was given; the module itself where it was not."""
    return getattr(module, "_orig_mod", module)
