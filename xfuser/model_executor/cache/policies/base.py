"""What a base method is: a signal, and a proposal made from its reduced sums.

No file of a method imports torch by itself: the settings in it are read for ``xdit --help`` too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xfuser.config import CacheConfig
    from xfuser.model_executor.adapters import ModelSpec, Streams
    from xfuser.model_executor.cache.blocks.token_choice import TokenChoice
    from xfuser.model_executor.cache.calibration.recorder import Samples
    from xfuser.model_executor.cache.calibration.store import Calibration
    from xfuser.model_executor.cache.steps import BranchKey, Call


@dataclass(frozen=True)
class Learning:
    """What a section knows of the generations that are recorded.

    Attributes:
        transformer: The model itself.
        blocks: Its blocks.
        spec: How it is cut into them.
        steps: Of every generation.
        settings: Those of the section's own ``Config`` that were named.
    """

    transformer: nn.Module
    blocks: Sequence[nn.Module]
    spec: ModelSpec
    steps: int
    settings: Mapping[str, Any]


class Section:
    """A part of a calibration: what is collected of whole generations, and the tensors that are made of it.

    One instance serves one recording, in which every block of every generation is evaluated. Derive from it within a
    method's policy, as its ``Section``; the file format and other sections know nothing of it.

    Args:
        learning: The model, and the number of steps.
    """

    @dataclass(frozen=True)
    class Config:
        """Settings of ``xdit calibrate`` and ``engine.record()`` for this section alone."""

    def __init__(self, learning: Learning) -> None:
        self.learning = learning
        self.settings = self.Config(**learning.settings)

    def called(self, branch: BranchKey, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The transformer is called with these arguments, for one step of a branch."""

    def opens(self, branch: BranchKey, block: nn.Module, arguments: Mapping[str, Any]) -> None:
        """A step of a branch begins with its first block, called with these arguments by name."""

    def sees(self, branch: BranchKey, block: int, inputs: Streams, outputs: Streams) -> None:
        """A block was evaluated: its streams before and after it, each of shape [B, P, D]."""

    def modules(self, index: int, block: nn.Module) -> Sequence[str]:
        """Name the modules within a block that it wants to see, as the block calls them."""
        return ()

    def sees_module(self, branch: BranchKey, block: int, name: str, inputs: torch.Tensor, outputs: Any) -> None:
        """A module within a block was evaluated: see `Policy.observe_module`."""

    def ends(self, branches: Mapping[BranchKey, Samples]) -> None:
        """A generation has ended; what was seen of branches that are not among the whole ones is to be forgotten.

        A branch's samples are a list of its steps: by block, per stream a pair of its sampled tokens [n, D] before and
        after the block, float32, the same tokens at every step.
        """

    def tensors(self) -> dict[str, torch.Tensor]:
        """Make what is stored, by name; nothing where nothing was seen.

        float32 is stored in half precision, float64 as it is."""
        raise NotImplementedError


class Policy:
    """Base of all methods. One instance serves one transformer; what a branch needs lives in `new_state`.

    Attributes:
        Section: What it learns by recording, and stores under its name in a calibration.
        common_threshold: The default of ``rel_l1_thresh`` where a model's family names none; ``None`` for a method that
            does not read it.
        approximation: What stands in for a block where nothing corrects the method.
        reads_calibration: Whether it takes anything from a calibration.
        needs_calibration: Whether it cannot do without.
        watches_modules: Whether its signal comes from modules within blocks, of which every rank sees its own.
        skips_modules: Whether it leaves out modules within blocks (`keeps_module`).
        sweep: The setting that trades speed for quality, and values to try, where that is not ``rel_l1_thresh``.
        by_step_number: Whether it decides by the step's number alone: a schedule, that comparisons leave out of "All".
        probe_blocks: Leading blocks that are evaluated before the proposal is made.
        observes_blocks: Whether it wants to see every block's input, evaluated or not, and decides block by block.
        signals: How many sums `measure` gives, where the first block alone is looked at.
        needs_num_steps: Rules that are off while nobody knows how many steps a generation has.
    """

    @dataclass(frozen=True)
    class Config:
        """Settings that belong to this method alone, each declared by a function of `xfuser.config.settings`."""

    Section: ClassVar[type[Section] | None] = None
    common_threshold: ClassVar[float | None] = None
    approximation: ClassVar[str] = "residual"
    reads_calibration: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    watches_modules: ClassVar[bool] = False
    skips_modules: ClassVar[bool] = False
    sweep: ClassVar[tuple[str, tuple[float, ...]] | None] = None
    by_step_number: ClassVar[bool] = False
    signals: ClassVar[int] = 0
    probe_blocks: ClassVar[int] = 0
    observes_blocks: ClassVar[bool] = False
    needs_num_steps: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, config: CacheConfig, spec: ModelSpec, blocks: int, calibration: Calibration | None = None
    ) -> None:
        self.config, self.spec, self.blocks = config, spec, blocks
        self.calibration = calibration

    @property
    def learned(self) -> Mapping[str, torch.Tensor] | None:
        """The tensors of its section; ``None`` where nothing is known, yet or at all."""
        return None if self.calibration is None else self.calibration.sections.get(str(self.config.use_cache))

    def new_state(self) -> Any:
        """Fresh state of one branch of one generation."""
        return None

    def measure(
        self, state: Any, block: nn.Module, arguments: Mapping[str, Any], inputs: Streams, outputs: Streams | None
    ) -> torch.Tensor:
        """The signal's local sums, one-dimensional, as many at every step.

        ``block``, ``arguments`` and ``inputs`` are the first block's; ``outputs`` its outputs where the method probes
        it, else ``None``.
        """
        raise NotImplementedError

    def propose(self, state: Any, sums: list[float], call: Call) -> bool:
        """Whether to evaluate this step, from the sums over all ranks."""
        raise NotImplementedError

    def propose_blocks(self, state: Any, sums: list[float], call: Call) -> tuple[float, ...]:
        """Per block, the share of its tokens to evaluate in this step; 0 skips the block."""
        return (float(self.propose(state, sums, call)),) * self.blocks

    def observe(self, state: Any, block: int, inputs: torch.Tensor, step: int) -> None:
        """A block's input [B, P, D], where the method observes blocks."""

    def layer_sums(self, state: Any, block: int, device: torch.device) -> torch.Tensor:
        """Sums of one block's input at this step, for ``sync="layer"``."""
        import torch

        return torch.zeros(0, device=device)

    def propose_block(self, state: Any, block: int, sums: list[float], call: Call) -> float:
        """The share of tokens to evaluate in one block, from `layer_sums` over all ranks."""
        raise NotImplementedError

    def choose_tokens(self, state: Any, call: Call) -> TokenChoice | None:
        """Which tokens evaluated blocks see in this step; ``None`` for all."""
        return None

    def commit(self, state: Any, evaluated: bool) -> None:
        """Take in whether the whole step was evaluated; under a budget, what it proposed, as if it were alone."""

    # -- modules within blocks ----------------------------------------------------------------------------------------

    def modules(self, index: int, block: nn.Module) -> Sequence[str]:
        """Name the modules within a block that it wants to see, as the block calls them."""
        return ()

    def observe_module(self, state: Any, block: int, name: str, inputs: torch.Tensor, outputs: Any, call: Call) -> None:
        """A module was evaluated: its first argument [B, P, D], and what it gave: the image's tokens, or a tuple that
        begins with them. Where a block runs on parts of its tokens, it is called once for each of them.
        """

    def keeps_module(self, state: Any, block: int, name: str, inputs: torch.Tensor, call: Call) -> bool:
        """Whether what a module gave at its last evaluation is to stand for it now."""
        return False

    @classmethod
    def refused_where_shared(cls, config: CacheConfig) -> str | None:
        """Say what does not go where several ranks share an image, and why; ``None`` where everything does."""
        return None


def attentions_of(spec: ModelSpec, block: nn.Module) -> list[str]:
    """Name the modules within a block in which image tokens attend to each other."""
    names = dict.fromkeys(name for group in spec.groups for name in group.self_attention)
    return [name for name in names if getattr(block, name, None) is not None]


def no_signal(inputs: Streams) -> torch.Tensor:
    """Make the sums of a method that looks at nothing."""
    import torch

    return torch.zeros(0, device=inputs[0].device)


def relative_sums(current: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
    """Σ|current − previous| and Σ|previous|, shape [2]; zeros where there is no comparable previous tensor."""
    import torch

    if previous is None or previous.shape != current.shape:
        return torch.zeros(2, device=current.device)
    return torch.stack((_absolute_sum(current - previous), _absolute_sum(previous)))


def _absolute_sum(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    # Token by token first: one long sum in float32 depends on how many tokens a rank holds, in the sixth digit.
    return torch.linalg.vector_norm(tensor, ord=1, dim=-1, dtype=torch.float32).sum(dtype=torch.float64).float()


def relative_l1(sums: list[float]) -> float:
    """mean|a − b| / mean|b| from its sums; infinite where nothing can be compared, so that nobody hits."""
    difference, scale = sums
    if not (math.isfinite(difference) and math.isfinite(scale)) or scale <= 0:
        return math.inf
    return difference / scale
