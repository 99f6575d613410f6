"""Spreads a diffusers pipeline over the ranks of a mesh."""

from xfuser.model_executor.parallel.apply import ParallelPipeline, check_combination, parallelize

__all__ = ["ParallelPipeline", "check_combination", "parallelize"]
