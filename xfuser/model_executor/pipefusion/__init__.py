"""PipeFusion: blocks over stages, tokens over patches."""

from xfuser.model_executor.pipefusion.placement import Placement
from xfuser.model_executor.pipefusion.stage import Stage, drop_other_blocks, split_blocks

__all__ = ["Placement", "Stage", "drop_other_blocks", "split_blocks"]
