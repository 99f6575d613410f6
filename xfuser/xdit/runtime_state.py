"""What xDiT's scripts keep in its runtime state: the configs, the sizes that they set, and the processes' end."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from xfuser.config.parallel import ParallelConfig
from xfuser.xdit.configs import EngineConfig, InputConfig, RuntimeConfig
from xfuser.xdit.parallel_state import destroy_distributed_environment, get_world_group, start


class RuntimeState:
    """Ends what `xFuserArgs.create_config` began."""

    def destroy_distributed_env(self) -> None:
        """Part from the other processes."""
        global _state
        _state = None
        destroy_distributed_environment()

    destory_distributed_env = destroy_distributed_env  # how xDiT spelt it up to 0.4.3

    def is_ready(self) -> bool:
        """Whether the sizes were set."""
        return False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"xDiT's runtime state has no {name!r} here; it ends the processes with destroy_distributed_env(), and "
            "holds configs and sizes after initialize_runtime_state(pipeline, engine_config)"
        )


class ScriptState(RuntimeState):
    """What a script that spreads a transformer by itself sets in one place and reads in another.

    The engine reads none of it: its own pipelines take sizes from each call, and settings from the engine_config.

    Attributes:
        parallel_config: The engine_config's.
        runtime_config: The engine_config's.
        input_config: The sizes that were set.
        num_pipeline_patch: PipeFusion's patches.
        max_condition_sequence_length: Text tokens.
        split_text_embed_in_sp: Whether the ranks that share the tokens share the text's too.
    """

    def __init__(self, engine_config: EngineConfig) -> None:
        self.parallel_config: ParallelConfig = engine_config.parallel_config
        self.runtime_config: RuntimeConfig = engine_config.runtime_config
        self.input_config = InputConfig()
        self.num_pipeline_patch = engine_config.parallel_config.patches
        self.max_condition_sequence_length: int | None = None
        self.split_text_embed_in_sp = True
        self._ready = False

    def is_ready(self) -> bool:
        return self._ready

    def set_input_parameters(
        self,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        max_condition_sequence_length: int | None = None,
        split_text_embed_in_sp: bool = True,
    ) -> None:
        """Set what will be generated; what is left out stays as it was.

        Args:
            height: Pixels.
            width: Pixels.
            batch_size: Images at once.
            num_inference_steps: Denoising steps.
            seed: Seeds Python, numpy and torch, where it is another than before.
            max_condition_sequence_length: Text tokens.
            split_text_embed_in_sp: Whether the ranks that share the tokens share the text's too.
        """
        sizes = {
            "height": height,
            "width": width,
            "batch_size": batch_size,
            "num_inference_steps": num_inference_steps,
        }
        before = self.input_config
        self.input_config = replace(before, **{name: value for name, value in sizes.items() if value is not None})
        if seed is not None and seed != before.seed:
            self.input_config.seed = seed
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        self.max_condition_sequence_length = max_condition_sequence_length
        self.split_text_embed_in_sp = split_text_embed_in_sp
        self._ready = True


_state: ScriptState | None = None


def initialize_runtime_state(pipeline: Any, engine_config: EngineConfig) -> None:
    """Place this process among all, if that is not done, and keep the configs for `get_runtime_state`.

    Args:
        pipeline: The diffusers pipeline that the script is about to spread.
        engine_config: What `xFuserArgs.create_config` returned first.

    Raises:
        ValueError: The degrees do not fit the processes or the transformer, or others are in force.
    """
    global _state
    start(engine_config.parallel_config)
    transformer = getattr(pipeline, "transformer", None)
    heads = getattr(getattr(transformer, "config", None), "num_attention_heads", None)
    if heads is not None:
        engine_config.parallel_config.check_heads(heads)
    _state = ScriptState(engine_config)


def runtime_state_is_initialized() -> bool:
    """Whether `initialize_runtime_state` was called."""
    return _state is not None


def get_runtime_state() -> RuntimeState:
    """The state of this process.

    Raises:
        RuntimeError: The processes have not met yet.
    """
    get_world_group()
    return RuntimeState() if _state is None else _state
