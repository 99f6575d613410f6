"""PipeFusion: blocks over stages, tokens over patches."""

from xfuser.model_executor.pipefusion.partition import Partition
from xfuser.model_executor.pipefusion.stage import Stage, drop_other_blocks, split_blocks

__all__ = ["Partition", "Stage", "drop_other_blocks", "split_blocks"]
