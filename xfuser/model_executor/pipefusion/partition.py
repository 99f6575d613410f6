"""What part of an image's work this process does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xfuser.core.tokens import Extent, Layout
from xfuser.model_executor.pipefusion.stage import Stage


@dataclass(eq=False)
class Partition:
    """This process's images, tokens and blocks.

    Attributes:
        stage: Its blocks.
        branches: Ranks that the conditioning branches are spread over.
        branch: Which of them this is.
        layout: Its tokens in the call that runs; ``None`` for all.
        patches: Patches that displaced steps of PipeFusion split the tokens into.
        warmup_steps: Leading steps that are synchronous.
        max_lag: How many steps old the keys and values may be that a displaced step reads.
        peers: Ranks that hold the same blocks for other tokens or images of a branch's batch.
        reduce: Adds a tensor up over them, in place; ``None`` where there are no others.
    """

    stage: Stage
    branches: int = 1
    branch: int = 0
    layout: Layout | None = None
    patches: int = 1
    warmup_steps: int = 1
    max_lag: int = 1
    peers: int = 1
    reduce: Callable[[torch.Tensor], None] | None = None

    def extent(self, stream: torch.Tensor) -> Extent:
        """Where this rank's part of the image stream lies in the whole of it."""
        images, tokens = stream.shape[0], stream.shape[1]
        if self.layout is None:
            return Extent(images * self.branches, tokens, images * self.branch)
        return Extent(images * self.branches, self.layout.lengths[0], images * self.branch, self.layout.span(0).start)

    def displaces(self, step: int, lag: int | None) -> bool:
        """Whether a step may run patch by patch on keys and values that are ``lag`` steps old (``None``: there are
        none).
        """
        return self.patches > 1 and step >= self.warmup_steps and lag is not None and lag <= self.max_lag

    @property
    def may_displace(self) -> bool:
        """Whether keys and values have to be remembered."""
        return not self.stage.is_alone and self.patches > 1 and self.max_lag > 0
