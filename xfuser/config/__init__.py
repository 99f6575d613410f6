"""Settings as frozen dataclasses, and their reading from a command line."""

from xfuser.config.args import FlexibleArgumentParser, xFuserArgs
from xfuser.config.cache import CacheConfig
from xfuser.config.config import EngineConfig, InputConfig, ModelConfig, RuntimeConfig
from xfuser.config.parallel import ParallelConfig
from xfuser.names import looked_up

__all__ = [
    "CacheConfig",
    "EngineConfig",
    "FlexibleArgumentParser",
    "InputConfig",
    "ModelConfig",
    "ParallelConfig",
    "RuntimeConfig",
    "xFuserArgs",
]

_DEGREES = "ParallelConfig holds every degree"
_NOT_CARRIED_OVER = {
    "DataParallelConfig": _DEGREES,
    "PipeFusionParallelConfig": _DEGREES,
    "SequenceParallelConfig": _DEGREES,
    "TensorParallelConfig": "there is no tensor parallelism; use ulysses_degree or pipefusion_parallel_degree",
}

__getattr__ = looked_up(__name__, dict.fromkeys(__all__, __name__), _NOT_CARRIED_OVER)
