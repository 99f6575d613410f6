"""Import paths that users of xDiT know; the engine itself finds the model's spec by its class."""

from xfuser.model_executor.cache.diffusers_adapters.family import apply_cache_on_transformer

__all__ = ["apply_cache_on_transformer"]
