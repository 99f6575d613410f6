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

__getattr__ = looked_up(__name__, dict.fromkeys(__all__, __name__))
