"""xDiT's command line: `xFuserArgs` reads it, and its `create_config` starts the processes."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import Any

from xfuser.config.arguments import (
    add_base_arguments,
    add_correction_arguments,
    add_parallel_arguments,
    correction_settings,
    named_settings,
    parallel_config,
    positive,
)
from xfuser.config.cache import METHODS, CacheConfig
from xfuser.config.launched import launched
from xfuser.config.parallel import ParallelConfig
from xfuser.config.parser import OneLineParser
from xfuser.config.refused import RefusedArguments, add_refused_arguments
from xfuser.config.settings import setting_of
from xfuser.xdit.configs import OUTPUT_TYPES, EngineConfig, InputConfig, ModelConfig, RuntimeConfig
from xfuser.xdit.workers import WorkerArguments, add_worker_arguments

# The settings of `CacheConfig` that have flags; None and False leave them to the script or to the default.
CacheFlags = make_dataclass(
    "CacheFlags",
    [
        (each.name, Any, False if each.default is False else None)
        for each in fields(CacheConfig)
        if setting_of(each).argument is not None
    ],
)


class FlexibleArgumentParser(OneLineParser):
    """Takes flags with dashes for those with underscores, and says in one line what is wrong with one."""

    def __init__(self, *args: Any, allow_abbrev: bool = True, **settings: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **settings)

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


@dataclass
class xFuserArgs(WorkerArguments, RefusedArguments, CacheFlags):  # noqa: N801 (xDiT's name)
    """Settings as xDiT's scripts take them, with this engine's cache settings beside them.

    Raises:
        ValueError: A flag of xDiT is set that this engine does not have.
    """

    model: str = ""
    download_dir: str | None = None
    trust_remote_code: bool = False  # changes nothing: no code is run that comes with a model
    # runtime
    warmup_steps: int = 1
    use_parallel_vae: bool = False
    use_torch_compile: bool = False
    enable_tiling: bool = False
    enable_slicing: bool = False
    # parallel
    data_parallel_degree: int = 1
    use_cfg_parallel: bool = False
    ulysses_degree: int = 1
    ring_degree: int = 1
    pipefusion_parallel_degree: int = 1
    num_pipeline_patch: int | None = None
    attn_layer_num_for_pp: Sequence[int] | None = None
    pipefusion_max_lag: int | None = None
    verify_agreement: bool = False
    # input
    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 20
    max_sequence_length: int = 256
    prompt: str | list[str] = ""
    negative_prompt: str | list[str] = ""
    no_use_resolution_binning: bool = False
    seed: int = 42
    output_type: str = "pil"
    guidance_scale: float = 3.5
    # cache
    use_teacache: bool = False
    use_fbcache: bool = False
    use_cache: str | None = None

    def __post_init__(self) -> None:
        self.check_refused()

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add every flag to a parser, and return it."""
        parser.add_argument("--model", required=True, help="folder or hub id of a diffusers pipeline")
        parser.add_argument("--download_dir", help="where downloads are kept (default: Hugging Face's own cache)")
        parser.add_argument("--trust_remote_code", action="store_true", help="changes nothing: no such code is run")
        group = parser.add_argument_group("input")
        group.add_argument("--prompt", nargs="*", default="", help="one image a prompt")
        group.add_argument("--negative_prompt", nargs="*", default="", help="one for each prompt (default: none)")
        group.add_argument("--height", type=positive, default=1024, help="pixels (default: %(default)s)")
        group.add_argument("--width", type=positive, default=1024, help="pixels (default: %(default)s)")
        group.add_argument("--num_inference_steps", type=positive, default=20, help="default: %(default)s")
        group.add_argument("--max_sequence_length", type=positive, default=256, help="text tokens (default: 256)")
        group.add_argument("--guidance_scale", type=float, default=3.5, help="default: %(default)s")
        group.add_argument("--seed", type=int, default=42, help="default: %(default)s")
        group.add_argument("--output_type", choices=OUTPUT_TYPES, default="pil", help="default: %(default)s")
        group.add_argument("--no_use_resolution_binning", action="store_true", help="PixArt: any size as it is")
        group = parser.add_argument_group("runtime")
        group.add_argument("--use_torch_compile", action="store_true", help="compile the blocks")
        group.add_argument("--enable_tiling", action="store_true", help="decode an image in tiles")
        group.add_argument("--enable_slicing", action="store_true", help="decode one image at a time")
        add_parallel_arguments(parser)
        add_worker_arguments(parser)
        group = parser.add_argument_group("cache")
        group.add_argument("--use_teacache", action="store_true", help="the same as --use_cache Tea")
        group.add_argument("--use_fbcache", action="store_true", help="the same as --use_cache Fb")
        group.add_argument("--use_cache", choices=list(map(str, METHODS)), help="base method (default: the script's)")
        group.add_argument("--rel_l1_thresh", type=float, help="its threshold (default: the script's, or the model's)")
        add_base_arguments(parser)
        add_correction_arguments(parser)
        add_refused_arguments(parser)
        return parser

    @classmethod
    def from_cli_args(cls, args: Namespace) -> xFuserArgs:
        """The settings of a parsed command line."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(cls) if hasattr(args, each.name)})

    def create_config(self) -> tuple[EngineConfig, InputConfig]:
        """Check the settings, meet the job's other processes, and place this one among them.

        With ``use_ray`` nobody is met: the processes are started by `RayDiffusionPipeline.from_pretrained`.

        Returns:
            What to load and how to run it, and what to generate.

        Raises:
            ValueError: A setting is out of its range, or the degrees do not fit the number of processes.
        """
        self.check_refused()
        parallel = self.parallel_config()
        self.check_workers(parallel.world_size, self.use_parallel_vae, launched())
        engine_config = EngineConfig(
            ModelConfig(self.model, self.download_dir),
            RuntimeConfig(
                warmup_steps=parallel.warmup_steps,
                use_parallel_vae=parallel.use_parallel_vae,
                use_torch_compile=self.use_torch_compile,
                use_teacache=self.use_teacache,
                use_fbcache=self.use_fbcache,
                enable_tiling=self.enable_tiling,
                enable_slicing=self.enable_slicing,
                use_ray=self.use_ray,
                vae_parallel_size=self.vae_parallel_size,
            ),
            parallel,
            self.cache_settings(),
        )
        input_config = InputConfig(
            height=self.height,
            width=self.width,
            use_resolution_binning=not self.no_use_resolution_binning,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            max_sequence_length=self.max_sequence_length,
            seed=self.seed,
            output_type=self.output_type,
            guidance_scale=self.guidance_scale,
        )
        # Imports torch, which reading a command line does without.
        from xfuser.xdit.parallel_state import start

        if not self.use_ray:  # otherwise the processes that Ray starts meet each other
            start(parallel)
        return engine_config, input_config

    def parallel_config(self) -> ParallelConfig:
        """The degrees. What xDiT's launch scripts name for PipeFusion without using it is left out."""
        settings = Namespace(**vars(self))
        if self.vae_parallel_size:  # then those decode that do nothing else
            settings.use_parallel_vae = False
        if self.pipefusion_parallel_degree == 1:
            settings.warmup_steps = 1
            if self.num_pipeline_patch == 1:
                settings.num_pipeline_patch = None
        return parallel_config(settings)

    def cache_settings(self) -> dict[str, Any]:
        """The `CacheConfig` settings that the command line named."""
        settings = named_settings(Namespace(**vars(self)))
        settings |= correction_settings(Namespace(**vars(self)), self.enable_adacorrection)
        if not self.enable_adacorrection:
            del settings["enable_adacorrection"]
        for name in ("rel_l1_thresh", "approximation"):
            if getattr(self, name) is not None:
                settings[name] = getattr(self, name)
        named = {"Tea": self.use_teacache, "Fb": self.use_fbcache, self.use_cache or "": bool(self.use_cache)}
        methods = [name for name, chosen in named.items() if chosen]
        if len(methods) > 1:
            raise ValueError(f"two base methods were named, {' and '.join(methods)}; choose one")
        if methods:
            settings["use_cache"] = None if methods == ["None"] else methods[0]
        return settings
