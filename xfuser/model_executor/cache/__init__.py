"""Quality-controlled caching: attach it to a pipeline or a transformer, generate, read the summary."""

from __future__ import annotations

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.apply import (
    apply_cache_on_pipeline,
    apply_cache_on_transformer,
    cache_engine_of,
)
from xfuser.model_executor.cache.engine import CacheEngine

__all__ = ["CacheConfig", "CacheEngine", "apply_cache_on_pipeline", "apply_cache_on_transformer", "cache_engine_of"]
