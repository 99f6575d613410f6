"""When an engine learns a calibration, from which generations, and whether one that it has fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.config.cache import FIRST
from xfuser.model_executor.adapters import ModelSpec
from xfuser.model_executor.cache.calibration.recorder import Recorder
from xfuser.model_executor.cache.calibration.sections import build_sections
from xfuser.model_executor.cache.calibration.store import Calibration


class Calibrator:
    """Records on demand (`record`), or the first generation of a job where the settings say ``"first"``.

    Attributes:
        recorder: Watches the generation that runs, all of whose blocks are evaluated; ``None`` where nothing is
            recorded.
        calibration: What is known, from a file or from recording.
    """

    def __init__(
        self,
        config: CacheConfig,
        transformer: nn.Module,
        spec: ModelSpec,
        calibration: Calibration | None,
        describe: Callable[[], dict[str, Any]],
        weights: Callable[[], Any],
    ) -> None:
        self.recorder: Recorder | None = None
        self.calibration = calibration
        self._first = config.calibration == FIRST
        self._transformer, self._spec = transformer, spec
        self._blocks = len(spec.blocks(transformer))
        self._describe, self._weights = describe, weights
        self._learned_with: Any = None
        self._records_all = False
        self._settings: dict[str, Any] = {}
        self._by_steps: dict[int | None, Calibration] = {}

    @property
    def records_all(self) -> bool:
        return self._records_all

    @property
    def settings(self) -> dict[str, Any]:
        """What `record` was told."""
        return self._settings

    def check(self, transformer: nn.Module, blocks: Sequence[nn.Module], scheduler: Any) -> None:
        """Refuse a transformer or scheduler that a file's calibration was not made with (ValueError)."""
        if self.calibration is not None and not self._first:
            self.calibration.check(transformer, blocks, scheduler)

    def forget(self) -> Calibration | None:
        """Forget what was learned here, for a transformer or scheduler comes that it does not hold for; what does."""
        self._by_steps.clear()
        self.recorder = None
        return None if self._first else self.calibration

    def modules(self, index: int, block: nn.Module) -> list[str]:
        """Name the modules within a block that a recording sees."""
        sections = build_sections(self._transformer, self._spec, 1, self._settings).values()
        return list(dict.fromkeys(name for section in sections for name in section.modules(index, block)))

    def record(self, settings: Mapping[str, Any]) -> None:
        """From the next generation on, record all; with these settings of sections (TypeError for an unknown one)."""
        build_sections(self._transformer, self._spec, 1, settings)
        self._records_all, self._settings = True, dict(settings)

    def recorded(self) -> Calibration:
        """The calibration from all whole generations since `record` (ValueError without one)."""
        if self.recorder is None:
            raise ValueError("no generation was recorded; call record() and generate at least one image")
        self.recorder.finish_generation()
        return self.recorder.calibration(self._describe() | {"num_steps": self.recorder.expected_steps})

    def before_generation(self, num_steps: int | None) -> bool:
        """Take in the generation before, and prepare for one of so many steps; whether `calibration` has changed.

        Raises:
            ValueError: The calibration is for another number of steps, or there is none and the number is unknown, or
                there is only one, from which nothing can be recorded.
        """
        self.settle()
        before = self.calibration
        if self._first:
            weights = self._weights()
            if weights != self._learned_with:
                self._by_steps.clear()
                self._learned_with = weights
            self.calibration = self._by_steps.get(num_steps)
        if self._records_all and num_steps == 1:
            raise ValueError("calibration: one step reuses nothing, so nothing can be learned; take at least 2 steps")
        if self._records_all or (self._first and self.calibration is None and num_steps != 1):
            if num_steps is None:
                raise ValueError("calibration: the number of steps is unknown; set num_steps")
            if self.recorder is None or self.recorder.expected_steps != num_steps:
                sections = build_sections(self._transformer, self._spec, num_steps, self._settings)
                self.recorder = Recorder(self._blocks, num_steps, sections)
        else:
            self.recorder = None
            if self.calibration is not None:
                self.calibration.check_steps(num_steps)
        return self.calibration is not before

    def settle(self) -> None:
        """Take in the generation that has just ended, where it was whole; forget it where it was not."""
        if self.recorder is not None and self.recorder.finish_generation() and self._first:
            self._by_steps[self.recorder.expected_steps] = self.recorded()
            self.recorder = None
