"""The import path that xDiT's scripts know `RayDiffusionPipeline` by."""

from xfuser.names import looked_up
from xfuser.ray.diffusion import RayDiffusionPipeline

__all__ = ["RayDiffusionPipeline"]

__getattr__ = looked_up(__name__, {})
