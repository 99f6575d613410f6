"""Settings as frozen dataclasses, and their reading from a command line."""

from xfuser.config.cache import CacheConfig

__all__ = ["CacheConfig"]
