"""The models that the engine knows, one declaration each."""

from __future__ import annotations

from typing import Any

from torch import nn

from xfuser.model_executor.adapters import dit, flux
from xfuser.model_executor.adapters.declaration import BoundArguments, ModelDeclaration, Streams

DECLARATIONS = {module.DECLARATION.transformer_class: module.DECLARATION for module in (dit, flux)}

__all__ = ["DECLARATIONS", "BoundArguments", "ModelDeclaration", "Streams", "declaration_of"]


def declaration_of(transformer: Any) -> ModelDeclaration:
    """The declaration of a transformer, found through its class and the classes it derives from.

    Raises:
        TypeError: It is no module, or no declaration covers its class.
    """
    if not isinstance(transformer, nn.Module):
        raise TypeError(
            f"expected a diffusers transformer such as pipeline.transformer, got {type(transformer).__name__}"
        )
    for ancestor in type(transformer).__mro__:
        if ancestor.__name__ in DECLARATIONS:
            return DECLARATIONS[ancestor.__name__]
    supported = ", ".join(sorted(DECLARATIONS))
    raise TypeError(f"{type(transformer).__name__} is not supported; supported are {supported}")
