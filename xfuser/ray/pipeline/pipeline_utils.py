"""The import path that xDiT's scripts know `RayDiffusionPipeline` by."""

from xfuser.lazy import lazy_attributes
from xfuser.ray.diffusion import RayDiffusionPipeline

__all__ = ["RayDiffusionPipeline"]

__getattr__ = lazy_attributes(__name__, {})
