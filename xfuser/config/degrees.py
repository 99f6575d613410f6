"""The degrees by kind, as xDiT's scripts read them from ``engine_config.parallel_config``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataDegrees:
    """Groups of processes that generate different images, and ranks that share the branches of guidance."""

    dp_degree: int
    use_cfg_parallel: bool
    cfg_degree: int


@dataclass(frozen=True)
class SequenceDegrees:
    """Ranks that share an image's tokens: Ulysses times ring."""

    ulysses_degree: int
    ring_degree: int
    sp_degree: int


@dataclass(frozen=True)
class StageDegrees:
    """PipeFusion's stages, patches, and blocks of every stage (``None``: as even as possible)."""

    pp_degree: int
    num_pipeline_patch: int
    attn_layer_num_for_pp: tuple[int, ...] | None


@dataclass(frozen=True)
class TensorDegrees:
    """There is no tensor parallelism."""

    tp_degree: int = 1
