"""Which part of a batch of prompts a data-parallel group generates, by xDiT's rule: contiguous parts of equal size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_PROMPTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
_EMBEDDED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
    "negative_pooled_prompt_embeds",
)
_PER_IMAGE = ("generator", "latents")


def batch_of(arguments: Mapping[str, Any]) -> int:
    """How many prompts a pipeline's arguments hold."""
    for name in ("prompt", "prompt_embeds"):
        given = arguments.get(name)
        if given is not None:
            return _length(given) or 1
    return 1


def part_of_batch(arguments: Mapping[str, Any], group: int, groups: int) -> dict[str, Any] | None:
    """The arguments with which one of several groups calls a pipeline.

    A single prompt is every group's. One generator is every group's too, as in xDiT: each group draws from its start.

    Args:
        arguments: Of the whole batch, by name.
        group: Which group.
        groups: How many there are.

    Returns:
        The arguments of the group's part, or ``None`` where there are too few prompts to reach this group.

    Raises:
        ValueError: What goes with the prompts is not as many as they are.
    """
    batch = batch_of(arguments)
    if groups == 1 or batch == 1:
        return dict(arguments)
    size = -(-batch // groups)
    start, stop = group * size, min((group + 1) * size, batch)
    images = arguments.get("num_images_per_prompt") or 1
    part = dict(arguments)
    for names, rows in ((_PROMPTS + _EMBEDDED, 1), (_PER_IMAGE, images)):
        for name in names:
            length = _length(arguments.get(name))
            if length is None:
                continue
            if length != batch * rows:
                raise ValueError(
                    f"{name}: {length} given for {batch} prompts; give {batch * rows}, so that data-parallel groups "
                    "can share them out"
                )
            part[name] = arguments[name][start * rows : stop * rows]
    return part if start < stop else None


def _length(value: Any) -> int | None:
    """Rows of a list or a tensor; ``None`` for what is every prompt's."""
    if isinstance(value, (list, tuple)):
        return len(value)
    return value.shape[0] if isinstance(value, torch.Tensor) else None
