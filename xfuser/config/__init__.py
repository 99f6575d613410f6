"""Settings as frozen dataclasses, and their reading from a command line."""

from xfuser.config.cache import CacheConfig
from xfuser.config.parallel import ParallelConfig

__all__ = ["CacheConfig", "ParallelConfig"]
