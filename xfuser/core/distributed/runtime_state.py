"""What xDiT's scripts still do with its runtime state: end the processes' group."""

from __future__ import annotations

from typing import Any

from xfuser.core.distributed.parallel_state import destroy_distributed_environment, get_world_group


class RuntimeState:
    """Ends what `xFuserArgs.create_config` began."""

    def destroy_distributed_env(self) -> None:
        """Part from the other processes."""
        destroy_distributed_environment()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"xDiT's runtime state has no {name!r} here; only destroy_distributed_env() is carried over: sizes come "
            "from each call of the pipeline, settings from the engine_config of create_config()"
        )


def get_runtime_state() -> RuntimeState:
    """The state of this process.

    Raises:
        RuntimeError: The processes have not met yet.
    """
    get_world_group()
    return RuntimeState()
