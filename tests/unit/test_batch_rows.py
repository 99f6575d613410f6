"""Which arguments of a call have one row an image is declared by name, not guessed from lengths that agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import ALL_FAMILIES, Toy

from xfuser.core.tokens import narrow_batch
from xfuser.model_executor.adapters import BoundArguments, spec_of

PER_IMAGE = ("hidden_states", "ip_hidden_states", "timestep")


def test_a_table_of_as_many_tokens_stays_whole() -> None:
    """64 images of 64 tokens: the rotary table has 64 rows, and none of them is an image's."""
    images, table, text = torch.rand(64, 64, 4), torch.rand(64, 8), torch.rand(64, 5, 4)
    named = {
        "hidden_states": images,
        "image_rotary_emb": (table, table),
        "joint_attention_kwargs": {"ip_hidden_states": [text], "mask": table, "scale": 0.5},
        "timestep": torch.tensor(3),
    }
    taken = narrow_batch(named, PER_IMAGE, 64, slice(16, 32))
    assert torch.equal(taken["hidden_states"], images[16:32])
    assert taken["image_rotary_emb"] == (table, table)
    assert torch.equal(taken["joint_attention_kwargs"]["ip_hidden_states"][0], text[16:32])
    assert taken["joint_attention_kwargs"]["mask"] is table and taken["joint_attention_kwargs"]["scale"] == 0.5
    assert taken["timestep"] is named["timestep"]
    assert narrow_batch(named, PER_IMAGE, 64, None) == named


def test_one_row_is_everyones_and_any_other_number_is_refused() -> None:
    one = torch.rand(1, 4)
    assert narrow_batch({"timestep": one}, PER_IMAGE, 4, slice(0, 2))["timestep"] is one
    with pytest.raises(ValueError, match="^timestep has 3 rows for a batch of 4 images"):
        narrow_batch({"timestep": torch.rand(3)}, PER_IMAGE, 4, slice(0, 2))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_declared_is_what_grows_with_the_batch(toy: Toy) -> None:
    """Of the transformer and of its blocks, at two sizes of the batch: all that grows along, and nothing else."""
    spec = spec_of(toy.transformer)
    rows: list[dict[str, int]] = []
    modules = [toy.transformer, *spec.blocks(toy.transformer)]

    def note(module: Any, args: Any, kwargs: Any) -> None:
        named = BoundArguments(module.forward).named(args, kwargs)
        for name, value in _leaves(named):
            rows[-1][name] = value.shape[0] if value.dim() else 0

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        for batch in (3, 5):
            rows.append({})
            toy.images(1 + (toy.family == "pixart"), batch=batch)
    finally:
        for hook in hooks:
            hook.remove()
    fewer, more = rows
    assert fewer.keys() == more.keys()
    growing = {name for name in fewer if more[name] * 3 == fewer[name] * 5 and fewer[name]}
    assert growing == {name for name in fewer if name in spec.per_image and fewer[name] > 1}
    assert "hidden_states" in growing


def _leaves(named: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    found = []
    for name, value in named.items():
        if isinstance(value, dict):
            found += _leaves(value)
        elif isinstance(value, torch.Tensor):
            found.append((name, value))
        elif isinstance(value, (tuple, list)):
            found += [(name, each) for each in value if isinstance(each, torch.Tensor)]
    return found
