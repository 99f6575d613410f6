"""Settings as frozen dataclasses, and their reading from a command line."""

from xfuser.config.cache import CacheConfig
from xfuser.config.parallel import ParallelConfig
from xfuser.lazy import lazy_attributes

_XDIT = dict.fromkeys(("FlexibleArgumentParser", "xFuserArgs"), "xfuser.xdit.args") | dict.fromkeys(
    ("EngineConfig", "InputConfig", "ModelConfig", "RuntimeConfig"), "xfuser.xdit.configs"
)

__all__ = ["CacheConfig", "ParallelConfig", *_XDIT]

__getattr__ = lazy_attributes(__name__, dict.fromkeys(("CacheConfig", "ParallelConfig"), __name__) | _XDIT)
