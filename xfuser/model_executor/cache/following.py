"""Keeps an engine on what its pipeline has: a scheduler or a transformer may be assigned to it at any time."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters import denoisers_of
from xfuser.model_executor.cache.adacorrection.trajectory.wrapping import CallWrapper

if TYPE_CHECKING:
    from collections.abc import Callable

    from xfuser.model_executor.cache.engine import CacheEngine

logger = logging.getLogger(__name__)


class PipelineFollower:
    """Moves an engine to the pipeline's present transformer and scheduler at every call of the pipeline.

    Scripts that call the transformer in a loop of their own are followed to another scheduler as well, at its first
    call (`follow_scheduler`).

    Args:
        pipeline: The pipeline.
        engine: Attached to its transformer.
    """

    def __init__(self, pipeline: Any, engine: CacheEngine) -> None:
        self._pipeline, self._engine = pipeline, engine
        self._scheduler = pipeline.scheduler if hasattr(pipeline, "scheduler") else None
        engine.watch_scheduler(self._scheduler)
        self._call = CallWrapper(pipeline, self._run)

    def undo(self) -> None:
        """Leave the pipeline's calls alone again."""
        self._call.undo()

    def follow(self) -> None:
        """Move to what the pipeline has now.

        Raises:
            TypeError: The transformer that it has now is not supported.
            ValueError: One of them belongs to another engine, or does not fit the calibration.
        """
        denoisers, known = denoisers_of(self._pipeline), self._engine.transformers
        if len(denoisers) != len(known) or any(a is not b for a, b in zip(denoisers, known, strict=True)):
            self._engine.move_to(denoisers)
            logger.info("the cache follows the pipeline's new %s; statistics begin anew", type(denoisers[0]).__name__)
        self.follow_scheduler()

    def follow_scheduler(self) -> None:
        """Let the scheduler that the pipeline has now mark generations and steps (ValueError as for `follow`)."""
        scheduler = getattr(self._pipeline, "scheduler", None)
        if scheduler is self._scheduler:
            return
        self._engine.watch_scheduler(scheduler)
        self._scheduler = scheduler
        logger.info("the cache follows the pipeline's new %s", type(scheduler).__name__)

    def _run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.follow()
        return original(*args, **kwargs)
