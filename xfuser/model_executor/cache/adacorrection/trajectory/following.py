"""What of a pipeline is followed: its denoisers and its scheduler; and what cannot be."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from xfuser.model_executor.cache.adacorrection.trajectory.wrapping import is_wrapped
from xfuser.model_executor.cache.attach import is_attached

# What a pipeline calls besides its denoisers; whatever else is a module is taken for one of them.
NOT_DENOISERS = (
    *("vae", "vqvae", "vqgan", "movq", "autoencoder", "text", "image", "safety", "vocoder", "projection", "feature"),
    *("watermark", "tokenizer", "language", "clip", "connectors", "transcoder", "bert", "latent_upsampler"),
)


def denoiser_names(pipeline: Any) -> list[str]:
    """Name what a pipeline evaluates at every step: its modules that are no encoder, decoder or checker."""
    modules = [name for name, each in pipeline.components.items() if isinstance(each, nn.Module)]
    return [name for name in modules if not any(part in name for part in NOT_DENOISERS)]


def check_pipeline(pipeline: Any, above_blocks: bool = False) -> None:
    """Refuse a pipeline that cannot be followed, before anything is changed.

    Args:
        pipeline: The pipeline.
        above_blocks: Whether an engine at the block level may be attached to it.

    Raises:
        TypeError: It has no denoiser, no scheduler, several schedulers, or steps by hand.
        ValueError: A cache is attached to it already.
    """
    name = type(pipeline).__name__
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict) or not denoiser_names(pipeline):
        raise TypeError(f"{name} has no denoiser (transformer or unet); caching needs a pipeline with one")
    schedulers = [key for key, each in components.items() if hasattr(each, "set_timesteps")]
    if schedulers != ["scheduler"] or not hasattr(components["scheduler"], "step"):
        found = ", ".join(schedulers) or "none"
        raise TypeError(f"{name}: a cache follows one scheduler named 'scheduler'; this pipeline has {found}")
    if is_wrapped(pipeline) or any(is_wrapped(components[each]) for each in denoiser_names(pipeline)):
        raise ValueError(f"this {name} has a cache attached already; call remove() on its engine first")
    if is_attached(components["scheduler"], "step") and not above_blocks:
        raise ValueError(
            "this scheduler belongs to a pipeline with a cache attached; call remove() on its engine first"
        )
    source = _source_of_call(type(pipeline))
    if source is None:
        return
    if "scheduler" not in source or ".step(" not in source:
        inner = [each for each in ("decoder_pipe", "prior_pipe") if f"self.{each}" in source]
        which = f"; attach to {' or '.join(inner)}" if inner else ""
        raise TypeError(f"{name} does not step its scheduler in its own call, so nothing can be skipped{which}")
    if "copy.deepcopy(self.scheduler)" in source or "audio_scheduler" in source:
        raise TypeError(f"{name} steps two latents with two schedulers; a cache can follow one")


def _source_of_call(kind: type) -> str | None:
    """Read what a pipeline's call does: its own source, that of methods it names, and what it overrides and calls."""
    text, methods, seen = "", ["__call__"], set()
    while methods:
        method = methods.pop()
        for owner in kind.__mro__:
            found = vars(owner).get(method)
            if found is None or (owner, method) in seen:
                continue
            seen.add((owner, method))
            try:
                source = inspect.getsource(found)
            except (OSError, TypeError):
                return None
            text += source
            methods += [each for each in re.findall(r"self\.(\w+)\(", source) if each != method]
            if "super()" not in source:
                break
    return text
