"""The import path that xDiT's scripts know `xDiTParallel` by."""

from xfuser.model_executor.pipelines.upstream import xDiTParallel

__all__ = ["xDiTParallel"]
