"""What xDiT's scripts read from `xFuserArgs.create_config`, under xDiT's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xfuser.config.parallel import ParallelConfig

if TYPE_CHECKING:
    import torch

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ModelConfig:
    """Which pipeline is loaded, and where downloads are kept."""

    model: str
    download_dir: str | None = None


@dataclass
class RuntimeConfig:
    """How it runs.

    Args:
        warmup_steps: PipeFusion's leading synchronous steps; the first step always is one.
        dtype: What weights are loaded in where ``from_pretrained`` is not told a dtype.
        use_parallel_vae: Whether the ranks that share an image decode it together.
        use_torch_compile: Whether the blocks are compiled.
        use_teacache: Whether TeaCache was asked for.
        use_fbcache: Whether First Block Cache was asked for.
        enable_tiling: Decode the image in tiles.
        enable_slicing: Decode one image at a time.
        use_ray: Whether Ray starts the processes.
        vae_parallel_size: Ray: processes that do nothing but decode.
    """

    warmup_steps: int = 1
    dtype: torch.dtype | None = None
    use_parallel_vae: bool = False
    use_torch_compile: bool = False
    use_teacache: bool = False
    use_fbcache: bool = False
    enable_tiling: bool = False
    enable_slicing: bool = False
    use_ray: bool = False
    vae_parallel_size: int = 0


@dataclass(frozen=True)
class EngineConfig:
    """Everything but the input.

    Args:
        model_config: Which pipeline is loaded.
        runtime_config: How it runs.
        parallel_config: How it is spread over processes.
        cache_settings: The `CacheConfig` settings that the command line named; they go before a script's own.
    """

    model_config: ModelConfig
    runtime_config: RuntimeConfig
    parallel_config: ParallelConfig
    cache_settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class InputConfig:
    """What is generated.

    Raises:
        ValueError: Prompts and negative prompts are not as many, or the output type is unknown.
    """

    height: int = 1024
    width: int = 1024
    use_resolution_binning: bool = True
    batch_size: int | None = None
    prompt: str | list[str] = ""
    negative_prompt: str | list[str] = ""
    num_inference_steps: int = 20
    max_sequence_length: int = 256
    seed: int = 42
    output_type: str = "pil"
    guidance_scale: float = 3.5

    def __post_init__(self) -> None:
        prompts = len(self.prompt) if isinstance(self.prompt, list) else 1
        negatives = len(self.negative_prompt) if isinstance(self.negative_prompt, list) else 0
        if negatives not in (0, prompts):
            raise ValueError(
                f"--negative_prompt: {negatives} given for {prompts} prompts; give one for each prompt, or none"
            )
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"--output_type {self.output_type!r} is not known; choose one of {', '.join(OUTPUT_TYPES)}"
            )
        self.batch_size = self.batch_size or max(prompts, 1)
