"""Quality-controlled caching: attach it to a pipeline or a transformer, generate, read the summary."""

from __future__ import annotations

from xfuser.lazy import lazy_attributes

_PUBLIC = {"CacheConfig": "xfuser.config", "CacheEngine": "xfuser.model_executor.cache.engine"} | dict.fromkeys(
    ("apply_cache_on_pipeline", "apply_cache_on_transformer", "cache_engine_of"), "xfuser.model_executor.cache.apply"
)

__all__ = [*_PUBLIC]

# Looked up on first use: the settings of the base methods, which lie beneath, are read without torch.
__getattr__ = lazy_attributes(__name__, _PUBLIC)
