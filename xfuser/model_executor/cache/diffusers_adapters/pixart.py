"""The import path users know for PixArt."""

from xfuser.model_executor.cache.diffusers_adapters.family import apply_for

apply_cache_on_transformer = apply_for("PixArtTransformer2DModel")

__all__ = ["apply_cache_on_transformer"]
