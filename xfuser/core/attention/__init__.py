"""Where the keys and values of the tokens that are not evaluated come from."""

from xfuser.core.attention.remembered import KeyValueMemory, RememberedAttention

__all__ = ["KeyValueMemory", "RememberedAttention"]
