"""Spreads a diffusers pipeline over the ranks of a mesh."""

from xfuser.model_executor.parallel.apply import ParallelPipeline, parallelize

__all__ = ["ParallelPipeline", "parallelize"]
