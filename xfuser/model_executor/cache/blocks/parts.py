"""The denoisers of an engine: which go together, what is wrapped on each, and its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import BoundArguments, ModelSpec
from xfuser.model_executor.cache.blocks.compiling import CompilableBlock
from xfuser.model_executor.cache.blocks.runner import BlockRunner
from xfuser.model_executor.cache.blocks.state import BlockCall
from xfuser.model_executor.cache.foreign import refusing_calls, uncompilable
from xfuser.model_executor.cache.patching import Replacement, drop_empty_registry, has_registry, named_contexts

if TYPE_CHECKING:
    from xfuser.model_executor.cache.engine import CacheEngine


def check_model(transformers: Sequence[nn.Module], spec: ModelSpec, config: CacheConfig) -> None:
    """Refuse settings that do not go with a model, and denoisers that do not go together (ValueError)."""
    if not spec.same_tokens and (config.motion_threshold or config.granularity == "token"):
        name = "motion_threshold" if config.motion_threshold else "granularity='token'"
        raise ValueError(
            f"{name} chooses tokens, and those of a {spec.transformer_class} are others in every block; leave it out"
        )
    if config.calibration is not None:
        check_one_denoiser(transformers)
    counts = [len(spec.blocks(each)) for each in transformers]
    if len(set(counts)) > 1:
        raise ValueError(
            f"the pipeline's denoisers have {' and '.join(map(str, counts))} blocks, and one plan is for all of them; "
            "attach to one, with apply_cache_on_transformer"
        )


def check_one_denoiser(transformers: Sequence[nn.Module]) -> None:
    """Refuse several denoisers where one calibration is asked for (ValueError)."""
    if len(transformers) > 1:
        raise ValueError(
            f"calibration: it is for the blocks of one denoiser, and this pipeline has {len(transformers)}; leave it "
            "out, or work on the trajectory (target_speedup=3 and no use_cache), which takes all of them"
        )


class Part:
    """A denoiser that an engine is attached to. Most pipelines have one; some change to another one on the way.

    Args:
        engine: Handles its calls.
        transformer: The denoiser.
        runner: Runs its blocks.
    """

    def __init__(self, engine: CacheEngine, transformer: nn.Module, runner: BlockRunner) -> None:
        self.transformer, self.runner = transformer, runner
        self._engine = engine
        self._replacements: list[Replacement | CompilableBlock] = []

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks in the order in which they run."""
        return self.runner.blocks

    def attach(self) -> None:
        """Wrap the denoiser and its blocks."""
        self._had_registry = has_registry(self.transformer)
        self._arguments = BoundArguments(self.transformer.forward)
        self._replacements.append(Replacement(self.transformer, "forward", self._wrap_root))
        self._replacements += refusing_calls(self.transformer)
        if hasattr(self.transformer, "cache_context"):
            wrap = named_contexts(self._engine.note_context)
            self._replacements.append(Replacement(self.transformer, "cache_context", wrap))
        breaks = self.runner.wraps_within
        for index, block in enumerate(self.blocks):
            self._replacements.append(CompilableBlock(block, self._block_wrapper(index), breaks))
        self._replacements += self.runner.attach(lambda: self._engine.active)

    def watch(self, names: Callable[[int, nn.Module], Sequence[str]]) -> None:
        """Wrap modules within the blocks, by what names them, for a recording."""
        self._replacements += self.runner.modules.attach(self.blocks, names, lambda: self._engine.active)

    def detach(self) -> None:
        """Leave everything as it was."""
        while self._replacements:
            self._replacements.pop().undo()
        if not self._had_registry:
            drop_empty_registry(self.transformer)

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument of one of its calls."""
        return self._arguments.read(name, args, kwargs)

    def _wrap_root(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._engine.run_transformer(self, original, args, kwargs)

        root = uncompilable(forward)
        root.cache_engine = self._engine  # type: ignore[attr-defined]
        return root

    def _block_wrapper(self, index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                active = self._engine.active
                if active is None:
                    return original(*args, **kwargs)
                streams = self.runner.streams_of(active, index, args, kwargs)
                return self.runner.run_block(active, BlockCall(index, original, args, kwargs, streams))

            return forward

        return wrap
