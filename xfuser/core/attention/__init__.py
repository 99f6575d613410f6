"""Where the keys and values of the tokens that are not evaluated come from."""

from xfuser.core.attention.context import AttentionContext
from xfuser.core.attention.key_values import KeyValueMemory

__all__ = ["AttentionContext", "KeyValueMemory"]
