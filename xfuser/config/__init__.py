"""Settings as frozen dataclasses, and their reading from a command line."""

from xfuser.lazy import lazy_attributes

_XDIT = dict.fromkeys(("FlexibleArgumentParser", "xFuserArgs"), "xfuser.xdit.args") | dict.fromkeys(
    ("EngineConfig", "InputConfig", "ModelConfig", "RuntimeConfig"), "xfuser.xdit.configs"
)

_OWN = {"CacheConfig": "xfuser.config.cache", "ParallelConfig": "xfuser.config.parallel"}

__all__ = [*_OWN, *_XDIT]

# Looked up on first use: the base methods' own settings are declared with this package's functions, and read by it.
__getattr__ = lazy_attributes(__name__, _OWN | _XDIT)
