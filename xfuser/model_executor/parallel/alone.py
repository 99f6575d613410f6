"""One process that spends a base method's compute on the trajectory, as a command that runs on many can use it."""

from __future__ import annotations

from typing import Any

from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.model_executor.adapters import denoisers_of, spec_of
from xfuser.model_executor.cache.apply import attach_as_base, check_unattached
from xfuser.model_executor.parallel.compiled import compile_blocks


class AlonePipeline:
    """A diffusers pipeline on one rank, whose evaluations a base method counts and the trajectory places.

    It answers what is asked of a `ParallelPipeline`. What a base method would spend is counted by an engine of its own
    in the first call, which could not follow the same scheduler as a `ParallelPipeline`'s.

    Args:
        pipeline: The pipeline.
        mesh: Of one process.
        use_torch_compile: Compile every block's own forward.
        **settings: As for `apply_cache_on_pipeline`.

    Raises:
        TypeError: Unknown setting, or a pipeline that is not supported.
        ValueError: Settings do not go together, or a cache is attached already. Nothing has been changed then.
    """

    def __init__(self, pipeline: Any, mesh: ParallelMesh, use_torch_compile: bool = False, **settings: Any) -> None:
        self.pipeline, self.mesh = pipeline, mesh
        denoisers = denoisers_of(pipeline)
        blocks = [block for each in denoisers for block in spec_of(each).blocks(each)]
        for each in denoisers:
            check_unattached(each, pipeline.scheduler)
        self._inner = compile_blocks(blocks) if use_torch_compile else []
        try:
            self.trajectory = attach_as_base(pipeline, **settings)
        except BaseException:
            self._undo()
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipeline(*args, **kwargs)

    def summary(self) -> dict[str, Any]:
        """The trajectory's summary, and this process's place."""
        axes = ("data", "cfg", "pipefusion", "ring", "ulysses")
        mesh = dict(zip(axes, self.mesh.config.shape, strict=True))
        return {"mesh": mesh, "rank": self.mesh.coordinates(), **self.trajectory.summary()}

    @property
    def steps_done(self) -> int:
        """Steps of the current generation that are complete."""
        generation = self.trajectory.generation
        return 0 if generation is None else generation.step

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank that shares the image: this one."""
        return [value]

    def parameter_bytes(self) -> int:
        """What this process holds of the transformer's weights."""
        parameters = (parameter for each in denoisers_of(self.pipeline) for parameter in each.parameters())
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    def remove(self) -> None:
        """Take everything off again."""
        self.trajectory.remove()
        self._undo()

    def _undo(self) -> None:
        while self._inner:
            self._inner.pop().undo()
