"""Spreads a diffusers pipeline over the ranks of a mesh."""

from xfuser.model_executor.parallel.alone import AlonePipeline
from xfuser.model_executor.parallel.apply import ParallelPipeline, check_combination, parallelize

__all__ = ["AlonePipeline", "ParallelPipeline", "check_combination", "parallelize"]
