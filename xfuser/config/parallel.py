"""How a generation is spread over processes, checked once and in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from xfuser.config.degrees import DataDegrees, SequenceDegrees, StageDegrees, TensorDegrees
from xfuser.config.settings import plain_number

DIMENSIONS = ("data", "cfg", "pipefusion", "ring", "ulysses")


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of every kind of parallelism; their product is the number of processes.

    Args:
        data_parallel_degree: Groups of processes that generate different images.
        use_cfg_parallel: Evaluate the conditional and the unconditional branch on different ranks.
        pipefusion_parallel_degree: Stages that the blocks are split over (PipeFusion, arXiv 2405.14430).
        ring_degree: Ranks that pass keys and values round (ring attention, arXiv 2310.01889).
        ulysses_degree: Ranks that exchange tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509).
        num_pipeline_patch: Patches that the tokens are split into for PipeFusion; by default one a stage.
        warmup_steps: PipeFusion: leading steps in which every token attends to fresh keys and values, at least 0. The
            first step always is one, since nothing is remembered before it: 0 and 1 displace from the second step on.
        attn_layer_num_for_pp: PipeFusion: blocks of every stage; by default as even as possible.
        pipefusion_max_lag: PipeFusion: how many steps old remembered keys and values may be, at least 0. Where they
            would be older, the step is synchronous. By default 1, and 0 with a cache.
        use_parallel_vae: Decode the latents in patches on all ranks that share an image (DistVAE).
        verify_agreement: Compare every step's plan over the ranks that share an image, and stop all of them where two
            differ. It costs a second exchange a step.

    Raises:
        ValueError: A value is out of its range.
    """

    data_parallel_degree: int = 1
    use_cfg_parallel: bool = False
    pipefusion_parallel_degree: int = 1
    ring_degree: int = 1
    ulysses_degree: int = 1
    num_pipeline_patch: int | None = None
    warmup_steps: int = 1
    attn_layer_num_for_pp: tuple[int, ...] | None = None
    pipefusion_max_lag: int | None = None
    use_parallel_vae: bool = False
    verify_agreement: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, plain_number(getattr(self, each.name)))
        for name in ("data_parallel_degree", "pipefusion_parallel_degree", "ring_degree", "ulysses_degree"):
            _at_least(name, getattr(self, name), 1)
        _at_least("warmup_steps", self.warmup_steps, 0)
        if self.num_pipeline_patch is not None:
            _at_least("num_pipeline_patch", self.num_pipeline_patch, 1)
        if self.pipefusion_max_lag is not None:
            _at_least("pipefusion_max_lag", self.pipefusion_max_lag, 0)
        if self.pipefusion_parallel_degree == 1:
            for name in ("num_pipeline_patch", "attn_layer_num_for_pp", "pipefusion_max_lag"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} belongs to PipeFusion; add --pipefusion_parallel_degree")
            if self.warmup_steps != 1:
                raise ValueError(
                    f"--warmup_steps {self.warmup_steps} belongs to PipeFusion; add --pipefusion_parallel_degree"
                )
        if self.use_parallel_vae and self.image_degree == 1:
            raise ValueError("--use_parallel_vae: one process has an image to itself; add a degree, or leave it out")
        split = self.attn_layer_num_for_pp
        if split is not None and (len(split) != self.pipefusion_parallel_degree or min(split) < 1):
            raise ValueError(
                f"--attn_layer_num_for_pp {' '.join(map(str, split))}: name the blocks of each of the "
                f"{self.pipefusion_parallel_degree} stages (--pipefusion_parallel_degree), at least 1 each"
            )

    @property
    def cfg_degree(self) -> int:
        return 2 if self.use_cfg_parallel else 1

    @property
    def sequence_degree(self) -> int:
        """Ranks that share the tokens of a stage."""
        return self.ring_degree * self.ulysses_degree

    @property
    def dp_degree(self) -> int:
        """xDiT's name of the data-parallel degree."""
        return self.data_parallel_degree

    @property
    def sp_degree(self) -> int:
        """xDiT's name of the sequence degree."""
        return self.sequence_degree

    @property
    def pp_degree(self) -> int:
        """xDiT's name of the number of PipeFusion's stages."""
        return self.pipefusion_parallel_degree

    @property
    def tp_degree(self) -> int:
        """xDiT's name of the degree of tensor parallelism, which there is none of."""
        return 1

    @property
    def dp_config(self) -> DataDegrees:
        """The images' and the branches' degrees, as xDiT's scripts read them."""
        return DataDegrees(self.data_parallel_degree, self.use_cfg_parallel, self.cfg_degree)

    @property
    def sp_config(self) -> SequenceDegrees:
        """The tokens' degrees, as xDiT's scripts read them."""
        return SequenceDegrees(self.ulysses_degree, self.ring_degree, self.sequence_degree)

    @property
    def pp_config(self) -> StageDegrees:
        """PipeFusion's degrees, as xDiT's scripts read them."""
        return StageDegrees(self.pipefusion_parallel_degree, self.patches, self.attn_layer_num_for_pp)

    @property
    def tp_config(self) -> TensorDegrees:
        """The degree of tensor parallelism, as xDiT's scripts read it."""
        return TensorDegrees()

    @property
    def patches(self) -> int:
        return self.num_pipeline_patch or self.pipefusion_parallel_degree

    @property
    def shape(self) -> tuple[int, ...]:
        """The degrees, in the order of `DIMENSIONS`."""
        return (
            self.data_parallel_degree,
            self.cfg_degree,
            self.pipefusion_parallel_degree,
            self.ring_degree,
            self.ulysses_degree,
        )

    @property
    def world_size(self) -> int:
        return prod(self.shape)

    @property
    def image_degree(self) -> int:
        """Ranks that share an image, and so decide together."""
        return self.world_size // self.data_parallel_degree

    def check_world(self, world_size: int) -> None:
        """Refuse a number of processes that is not the product of the degrees (ValueError)."""
        if world_size != self.world_size:
            raise ValueError(
                f"{world_size} processes were started, but the degrees ask for {self.world_size} "
                f"(--data_parallel_degree {self.data_parallel_degree} x --use_cfg_parallel {self.cfg_degree} x "
                f"--pipefusion_parallel_degree {self.pipefusion_parallel_degree} x --ring_degree {self.ring_degree} x "
                f"--ulysses_degree {self.ulysses_degree}); set --nproc_per_node or the degrees"
            )

    def check_model(self, heads: int, blocks: int) -> None:
        """Refuse degrees that a model's attention heads or blocks do not allow (ValueError)."""
        self.check_heads(heads)
        if self.pipefusion_parallel_degree > blocks:
            raise ValueError(
                f"--pipefusion_parallel_degree {self.pipefusion_parallel_degree}: the model has only {blocks} blocks"
            )
        split = self.attn_layer_num_for_pp
        if split is not None and sum(split) != blocks:
            raise ValueError(
                f"--attn_layer_num_for_pp {' '.join(map(str, split))} adds up to {sum(split)}; the model has {blocks} "
                "blocks"
            )

    def check_heads(self, heads: int) -> None:
        """Refuse a Ulysses degree that a model's attention heads do not allow (ValueError)."""
        if heads % self.ulysses_degree:
            fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"--ulysses_degree {self.ulysses_degree} does not divide the model's {heads} attention heads; "
                f"choose one of {fitting}, or use --ring_degree"
            )

    def check_tokens(self, tokens: int) -> None:
        """Refuse more ranks or patches than there are image tokens (ValueError)."""
        if self.sequence_degree > tokens:
            raise ValueError(
                f"--ulysses_degree {self.ulysses_degree} x --ring_degree {self.ring_degree}: an image has only "
                f"{tokens} tokens"
            )
        if self.patches * self.sequence_degree > tokens:
            raise ValueError(
                f"--num_pipeline_patch {self.patches}: a rank has only {tokens // self.sequence_degree} image tokens"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"--{name} {value}: expected a whole number of at least {least}")
