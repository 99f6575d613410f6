"""Other caches and compilers on the same transformer: what goes together, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from xfuser.core.modules import uncompiled
from xfuser.model_executor.cache.patching import Replacement, has_registry

_CACHES_BY_ANOTHER_NAME = ("pyramid_attention_broadcast",)  # modules of diffusers.hooks whose name does not end so
_BLOCKS_INSTEAD = (
    "a cache decides between blocks, outside of what is compiled: compile the blocks instead, with "
    "transformer.compile_repeated_blocks(fullgraph=True) or block.compile(), before or after attaching; or work on the "
    "trajectory (target_speedup=3 and no use_cache), which takes a compiled transformer as it is"
)
COMPILED_WHOLE = f"this transformer is compiled as a whole; {_BLOCKS_INSTEAD}"


def check_no_other_cache(module: nn.Module) -> None:
    """Refuse a transformer on which one of diffusers' own caches is switched on (ValueError)."""
    name = _diffusers_cache_on(module)
    if name is not None:
        raise ValueError(
            f"diffusers' own {name} is switched on on this {type(module).__name__}, and two caches would each reuse "
            "what the other reused; call disable_cache() first, or leave this one out"
        )


def refuse_enable_cache(module: nn.Module) -> list[Replacement]:
    """Have a module refuse diffusers' ``enable_cache`` for as long as a cache is attached."""
    if not hasattr(module, "enable_cache"):
        return []

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def enable_cache(*args: Any, **kwargs: Any) -> Any:
            raise ValueError(
                f"this {type(module).__name__} has a cache of xfuser attached, and two caches would each reuse what "
                "the other reused; call remove() on its engine first, or leave enable_cache() out"
            )

        return enable_cache

    return [Replacement(module, "enable_cache", wrap)]


def check_not_compiled_whole(module: Any) -> None:
    """Refuse a transformer that `torch.compile` or its own ``compile`` has made one graph of (ValueError)."""
    if uncompiled(module) is not module or getattr(module, "_compiled_call_impl", None) is not None:
        raise ValueError(COMPILED_WHOLE)


def uncompilable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a transformer's wrapper out of any graph; where a full one is demanded, its error says what to do."""
    return torch.compiler.disable(forward, reason=f"a cache is attached to this transformer; {_BLOCKS_INSTEAD}")


def refusing_calls(transformer: nn.Module) -> list[Replacement]:
    """Have a transformer refuse what does not go with a cache on its blocks: another cache, one graph of it all."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def compile(*args: Any, **kwargs: Any) -> Any:
            raise ValueError(f"a cache is attached to this transformer; {_BLOCKS_INSTEAD}")

        return compile

    return [*refuse_enable_cache(transformer), Replacement(transformer, "compile", wrap)]


def _diffusers_cache_on(module: nn.Module) -> str | None:
    config = getattr(module, "_cache_config", None)
    if config is not None:
        return type(config).__name__.removesuffix("Config")
    for each in module.modules():
        for hook in each._diffusers_hook.hooks.values() if has_registry(each) else ():
            package, _, name = type(hook).__module__.rpartition(".")
            if package == "diffusers.hooks" and (name.endswith("_cache") or name in _CACHES_BY_ANOTHER_NAME):
                return name
    return None
