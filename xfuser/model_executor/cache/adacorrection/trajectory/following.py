"""What of a pipeline is followed: its denoisers and its scheduler; and what cannot be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from xfuser.core.modules import uncompiled
from xfuser.model_executor.cache.adacorrection.trajectory.wrapping import CallWrapper, Handler, is_wrapped
from xfuser.model_executor.cache.foreign import check_no_other_cache, refuse_enable_cache
from xfuser.model_executor.cache.patching import Replacement, check_scheduler_free

# What a pipeline calls besides its denoisers; whatever else is a module is taken for one of them.
NOT_DENOISERS = (
    *("vae", "vqvae", "vqgan", "movq", "autoencoder", "text", "image", "safety", "vocoder", "projection", "feature"),
    *("watermark", "tokenizer", "language", "clip", "connectors", "transcoder", "bert", "latent_upsampler"),
    *("adapter", "estimator", "renderer"),
)
# Their latents are numbers of tokens, of which none lies between two others.
DISCRETE = ("AmusedScheduler", "VQDiffusionScheduler", "BlockRefinementScheduler")


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
    source = _source_of_call(type(pipeline))
    schedulers = [key for key, each in components.items() if hasattr(each, "set_timesteps")]
    schedulers = [key for key in schedulers if key == "scheduler" or source is None or _steps(source, key)]
    if schedulers != ["scheduler"] or not hasattr(components["scheduler"], "step"):
        found = ", ".join(schedulers) or "none"
        raise TypeError(f"{name}: a cache follows one scheduler named 'scheduler'; this pipeline has {found}")
    if is_wrapped(pipeline) and not above_blocks:
        raise ValueError(f"this {name} has a cache attached already; call remove() on its engine first")
    for each in denoiser_names(pipeline):
        check_denoiser(components[each])
    if not above_blocks:
        check_scheduler_free(components["scheduler"])
    kind = type(components["scheduler"])
    takes = inspect.signature(kind.step).parameters
    if kind.__name__ in DISCRETE or "model_output" not in takes or "sample" not in takes:
        raise TypeError(f"{name}: a cache cannot follow {kind.__name__}, whose steps are not from latent to latent")
    if source is None:
        return
    if "scheduler" not in source or ".step(" not in source:
        inner = [each for each in ("decoder_pipe", "prior_pipe") if f"self.{each}" in source]
        which = f"; attach to {' or '.join(inner)}" if inner else ""
        raise TypeError(f"{name} does not step its scheduler in its own call, so nothing can be skipped{which}")
    if "deepcopy(self.scheduler)" in source or "audio_scheduler" in source:
        raise TypeError(f"{name} steps two latents with two schedulers; a cache can follow one")


def check_denoiser(module: nn.Module) -> None:
    """Refuse a denoiser on which a cache works already, an engine's or one of diffusers' own (ValueError)."""
    if is_wrapped(module):
        raise ValueError(
            f"this {type(module).__name__} has a cache attached already; call remove() on its engine first"
        )
    check_no_other_cache(uncompiled(module))


def _steps(source: str, scheduler: str) -> bool:
    """Whether a call may step this scheduler; some pipelines have another one that only adds noise to an image."""
    uses = re.findall(rf"self\.{scheduler}\b(?:\.(\w+))?", source)
    return any(use in ("", "step", "set_timesteps") for use in uses)


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


class Attachment:
    """Stands before the calls of a pipeline, of its denoisers and of its scheduler, and moves with what it has.

    Args:
        pipeline: The pipeline, checked.
        run_pipeline: Handles its calls.
        run_denoiser: Handles those of its denoisers.
        wrap_set_timesteps: Wraps the scheduler's method.
        wrap_step: Likewise.
        above_blocks: Whether an engine at the block level may follow the same scheduler.
    """

    def __init__(
        self,
        pipeline: Any,
        run_pipeline: Handler,
        run_denoiser: Handler,
        wrap_set_timesteps: Callable[[Callable[..., Any]], Callable[..., Any]],
        wrap_step: Callable[[Callable[..., Any]], Callable[..., Any]],
        above_blocks: bool,
    ) -> None:
        self._pipeline, self._above_blocks = pipeline, above_blocks
        self._run_denoiser = run_denoiser
        self._methods = {"set_timesteps": wrap_set_timesteps, "step": wrap_step}
        self._denoisers: list[CallWrapper] = []
        self._refusals: list[Replacement] = []
        self._scheduler: Any = None
        self._marks: list[Replacement] = []
        self._call = CallWrapper(pipeline, run_pipeline)
        self._watch(self._present())
        self.follow_scheduler()

    def undo(self) -> None:
        """Leave everything as it was."""
        self._leave_denoisers()
        self._call.undo()
        self.leave_scheduler()

    def follow(self) -> bool:
        """Move to what the pipeline has now, and tell whether a denoiser is another one.

        Raises:
            ValueError: One of them has another cache. Nothing has been changed then.
        """
        known = {id(wrapper.owner) for wrapper in self._denoisers}
        present = self._present()
        moves = known != {id(module) for module in present}
        if moves:
            for module in present:
                if id(module) not in known:
                    check_denoiser(module)
        if self._pipeline.scheduler is not self._scheduler:
            self.follow_scheduler()
        if moves:
            self._leave_denoisers()
            self._watch(present)
        return moves

    def follow_scheduler(self) -> None:
        """Move to the scheduler that the pipeline has now.

        Raises:
            ValueError: Another pipeline's cache follows it. Nothing has been changed then.
        """
        scheduler = self._pipeline.scheduler
        if not self._above_blocks:
            check_scheduler_free(scheduler)
        self.leave_scheduler()
        self._scheduler = scheduler
        self._marks = [Replacement(scheduler, name, wrap) for name, wrap in self._methods.items()]

    def leave_scheduler(self) -> None:
        """Leave the scheduler's calls alone again."""
        while self._marks:
            self._marks.pop().undo()
        self._scheduler = None

    def _present(self) -> list[Any]:
        modules = [getattr(self._pipeline, name) for name in denoiser_names(self._pipeline)]
        return list({id(module): module for module in modules}.values())

    def _watch(self, denoisers: list[Any]) -> None:
        for module in denoisers:
            self._denoisers.append(CallWrapper(module, self._run_denoiser))
            self._refusals += refuse_enable_cache(uncompiled(module))

    def _leave_denoisers(self) -> None:
        while self._refusals:
            self._refusals.pop().undo()
        while self._denoisers:
            self._denoisers.pop().undo()
