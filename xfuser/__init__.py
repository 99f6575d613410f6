"""xfuser: inference for diffusion transformers with caching that does not cost quality."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("xfuser")
except PackageNotFoundError:
    __version__ = "0+source"

_PUBLIC = {
    "CacheConfig": "xfuser.config",
    "CacheEngine": "xfuser.model_executor.cache",
    "ParallelConfig": "xfuser.config",
    "ParallelMesh": "xfuser.core.distributed.mesh",
    "apply_cache_on_pipeline": "xfuser.model_executor.cache",
    "apply_cache_on_transformer": "xfuser.model_executor.cache",
    "load_pipeline": "xfuser.model_executor.pipelines",
    "parallelize": "xfuser.model_executor.parallel",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing diffusers takes seconds, which `xdit --help` should not wait for.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'xfuser' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
