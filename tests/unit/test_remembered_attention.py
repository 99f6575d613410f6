"""Moving tokens attend to the remembered keys and values of the others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from toys import ALL_FAMILIES, Toy, attached, choosing, drive

from xfuser.core.attention import KeyValueMemory
from xfuser.model_executor.adapters import spec_of
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice

STEPS = 8
WARMUP = 3


# -- remembered keys and values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_first", [False, True])
def test_fresh_keys_are_put_among_the_remembered_ones(text_first: bool) -> None:
    """Two text tokens and five image tokens, of which 1 and 4 are fresh, and all text is."""
    memory = KeyValueMemory()
    held = torch.arange(7.0).reshape(1, 1, 7, 1)
    memory.keep(3, held.clone(), held.clone() * 10)
    text, image = torch.tensor([100.0, 101.0]), torch.tensor([201.0, 204.0])
    fresh = torch.cat([text, image] if text_first else [image, text]).reshape(1, 1, 4, 1)
    others = slice(0, 2) if text_first else slice(5, 7)
    key, value = memory.update(3, torch.tensor([[1, 4]]), 2 if text_first else 0, others, fresh, fresh * 10)
    expected = [100, 101, 2, 201, 4, 5, 204] if text_first else [0, 201, 2, 3, 204, 100, 101]
    assert key.flatten().tolist() == expected
    assert value.flatten().tolist() == [10 * each for each in expected]
    assert [tensor.flatten().tolist() for tensor in memory.tensors()] == [key.flatten().tolist()] * 1 + [
        value.flatten().tolist()
    ]
    assert memory.holds(range(3, 4)) and not memory.holds(range(3, 5))


def held(memory: KeyValueMemory, module: int) -> list[float]:
    """The values that a patch of no tokens finds."""
    return memory.update_spans(module, [], torch.empty(1, 1, 0, 1), torch.empty(1, 1, 0, 1))[1].flatten().tolist()


def test_remembered_ones_are_drawn_on_to_the_step_that_reads_them() -> None:
    """Two tokens at 1 and 5 in step 2, at 2 and 3 in step 4: in step 5 they would be at 2.5 and 2."""
    memory = KeyValueMemory()
    for step, values in ((2, [1.0, 5.0]), (4, [2.0, 3.0])):
        memory.begin_step(step, extrapolate=False)
        memory.keep(0, torch.zeros(1, 1, 2, 1), torch.tensor(values).reshape(1, 1, 2, 1))
    memory.begin_step(5, extrapolate=True)
    assert held(memory, 0) == [2.5, 2.0]
    # What the step then keeps is what it computed, and not what was drawn on.
    fresh = torch.tensor([7.0, 9.0]).reshape(1, 1, 2, 1)
    memory.update_spans(0, [slice(0, 2)], fresh, fresh)
    memory.begin_step(6, extrapolate=True)
    assert held(memory, 0) == [12.0, 15.0]


def test_a_module_that_was_not_evaluated_keeps_its_own() -> None:
    memory = KeyValueMemory()
    for step, value in ((0, 1.0), (1, 2.0)):
        memory.begin_step(step, extrapolate=False)
        memory.keep(0, torch.full((1, 1, 1, 1), value), torch.full((1, 1, 1, 1), value))
    memory.begin_step(2, extrapolate=True)
    memory.begin_step(3, extrapolate=True)
    assert held(memory, 0) == [2.0]


def test_what_is_cleared_is_not_drawn_on() -> None:
    memory = KeyValueMemory()
    memory.begin_step(0, extrapolate=False)
    memory.keep(0, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    memory.begin_step(1, extrapolate=False)
    memory.clear()
    assert list(memory.tensors()) == []
    memory.begin_step(0, extrapolate=True)
    memory.keep(0, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    assert held(memory, 0) == [1.0]


# -- attention by hand ---------------------------------------------------------------------------------------------


def attention_modules(toy: Toy) -> list[tuple[int, str, nn.Module]]:
    names = spec_of(toy.transformer).groups[0].self_attention
    found = [(index, name, getattr(block, name, None)) for index, block in enumerate(toy.blocks) for name in names]
    return [(index, name, module) for index, name, module in found if module is not None]


class FullSequence:
    """What one attention module would give on all tokens, each as it was when it was last evaluated."""

    def __init__(self, module: nn.Module, name: str, text_first: bool) -> None:
        self.module, self.name, self.text_first = module, name, text_first
        self.places: torch.Tensor | None = None  # of the image tokens of this step; None for all
        self.tokens = 0
        self.image: torch.Tensor | None = None
        self.rotary: Any = None
        self.partial = 0

    def attend(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The engine's output, after comparing it with the module's own on the whole sequence."""
        output = original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        text = kwargs.get("encoder_hidden_states")
        inside = text is None and self.text_first and self.tokens != 0 and "image_rotary_emb" in kwargs
        lead = hidden.shape[1] - self._count() if inside else 0  # Flux's single blocks: text and image in one
        image = hidden[:, lead:]
        if self.places is None:
            self.image, self.rotary = image.clone(), kwargs.get("image_rotary_emb")
            return output
        self.partial += 1
        index = self.places[:, :, None].expand(-1, -1, image.shape[2])
        self.image = self.image.scatter(1, index, image)
        whole = torch.cat([hidden[:, :lead], self.image], dim=1)
        full = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if "image_rotary_emb" in kwargs:
            full["image_rotary_emb"] = self.rotary
        expected = type(self.module).forward(self.module, whole, **full)
        joint = isinstance(expected, tuple)
        ours, theirs = (output[0], expected[0]) if joint else (output, expected)
        torch.testing.assert_close(ours[:, :lead], theirs[:, :lead], rtol=1e-4, atol=1e-5)
        index = self.places[:, :, None].expand(-1, -1, theirs.shape[2])
        torch.testing.assert_close(ours[:, lead:], theirs[:, lead:].gather(1, index), rtol=1e-4, atol=1e-5)
        if joint:
            torch.testing.assert_close(output[1], expected[1], rtol=1e-4, atol=1e-5)
        return output

    def _count(self) -> int:
        return self.tokens if self.places is None else self.places.shape[1]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_moving_tokens_attend_to_the_remembered_ones(toy: Toy) -> None:
    """Every attention, at every step, is the module's own on the whole sequence: moving tokens and text as they are
    now, static ones as they were when they were last evaluated.
    """
    spec = spec_of(toy.transformer)
    sequences = [FullSequence(module, name, spec.text_first) for _, name, module in attention_modules(toy)]
    steps: list[int] = []
    previous: list[torch.Tensor] = []

    def choose(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The paper's saliency, from the first block's input."""
        hidden = args[0] if args else kwargs["hidden_states"]
        places = None
        if len(previous) >= WARMUP:
            square = (hidden - previous[-1]).square().sum(-1)
            moving = square >= 0.3 * square.max(dim=1, keepdim=True).values
            count = int(moving.sum(1).max())
            ranks = torch.where(moving, torch.inf, square).argsort(dim=1, descending=True)
            places = ranks[:, :count].sort(dim=1).values
            if spec.groups[0].per_token:
                union = sorted(set(places.flatten().tolist()))
                places = torch.tensor([union] * len(hidden))
            steps.append(places.shape[1])
        previous.append(hidden.clone())
        for each in sequences:
            each.places, each.tokens = places, hidden.shape[1]

    def checking(each: FullSequence) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        # Inside the engine's own wrapper the module's forward sees the chosen tokens; outside it, the same.
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: each.attend(original, args, kwargs)

        return wrap

    with attached(toy.pipeline, "pipeline", "Fast", rel_l1_thresh=0, motion_threshold=0.3), ExitStack() as stack:
        stack.callback(toy.blocks[0].register_forward_pre_hook(choose, with_kwargs=True).remove)
        for each in sequences:
            inner = each.module.forward
            each.module.forward = checking(each)(inner)
            stack.callback(setattr, each.module, "forward", inner)
        toy.images(STEPS, batch=2)
    assert len(steps) == STEPS - WARMUP
    assert all(1 <= count <= sequences[0].tokens for count in steps) and min(steps) < sequences[0].tokens
    assert all(each.partial == len(steps) for each in sequences)


def test_rotary_embeddings_follow_the_tokens(flux: Toy) -> None:
    """Text first, then the chosen image tokens, for both halves of the embedding."""
    places = torch.tensor([1, 5, 6])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["image_rotary_emb"])

    with choosing(lambda current: TokenChoice(places[None], current.shape[1])), ExitStack() as stack:
        for block in flux.blocks:
            stack.callback(block.attn.register_forward_pre_hook(note, with_kwargs=True).remove)
        settings = {"rel_l1_thresh": 0, "motion_threshold": 0.5}
        stack.enter_context(attached(flux.pipeline, "transformer", "Fast", **settings))
        drive(flux.transformer, 4)
    whole, partial = seen[0], seen[-len(flux.blocks) :]
    rows = torch.cat([torch.arange(6), places + 6])
    assert whole[0].shape[0] == 6 + 16
    for halves in partial:
        assert all(torch.equal(half, full[rows]) for half, full in zip(halves, whole, strict=True))
