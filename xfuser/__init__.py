"""xfuser: inference for diffusion transformers with caching that does not cost quality."""

from __future__ import annotations

from xfuser.lazy import lazy_attributes
from xfuser.xdit.finder import install
from xfuser.xdit.table import WRAPPED

_PUBLIC = {
    "__version__": "xfuser.version",
    "CacheConfig": "xfuser.config",
    "CacheEngine": "xfuser.model_executor.cache",
    "EngineConfig": "xfuser.config",
    "ParallelConfig": "xfuser.config",
    "ParallelMesh": "xfuser.core.distributed.mesh",
    "apply_cache_on_pipeline": "xfuser.model_executor.cache",
    "apply_cache_on_transformer": "xfuser.model_executor.cache",
    "cache_engine_of": "xfuser.model_executor.cache",
    "load_pipeline": "xfuser.model_executor.pipelines",
    "parallelize": "xfuser.model_executor.parallel",
    "xFuserArgs": "xfuser.config",
} | dict.fromkeys(("xDiTParallel", *WRAPPED), "xfuser.xdit.pipelines")

__all__ = [*_PUBLIC]

# Looked up on first use: importing diffusers takes seconds, which `xdit --help` should not wait for.
__getattr__ = lazy_attributes(__name__, _PUBLIC)

install()
