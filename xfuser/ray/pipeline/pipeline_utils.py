"""The import path that xDiT's scripts know `RayDiffusionPipeline` by."""

from xfuser.ray.diffusion import RayDiffusionPipeline

__all__ = ["RayDiffusionPipeline"]
