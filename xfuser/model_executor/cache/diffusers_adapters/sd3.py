"""The import path users know for Stable Diffusion 3."""

from xfuser.model_executor.cache.diffusers_adapters.family import apply_for

apply_cache_on_transformer = apply_for("SD3Transformer2DModel")

__all__ = ["apply_cache_on_transformer"]
