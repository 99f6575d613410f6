"""Token reduction: which tokens are evaluated, what they attend to, and what the others get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from toys import ALL_FAMILIES, Toy, attached, choosing, drive, wrapped

from xfuser.model_executor.adapters import SMALL, spec_of
from xfuser.model_executor.adapters.dit import build_small as build_toy_dit
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_transformer
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice
from xfuser.model_executor.cache.blocks.token_runner import TokenRunner
from xfuser.model_executor.cache.calibration.linear import RIDGE

STEPS = 8
WARMUP = 3


# -- the choice ----------------------------------------------------------------------------------------------------


def moved(*squares: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two states [B, P, 2] whose tokens' squared changes are these."""
    roots = torch.tensor(squares).sqrt()
    previous = torch.ones(*roots.shape, 2)
    return previous + torch.stack((0.6 * roots, -0.8 * roots), dim=-1), previous


@pytest.mark.parametrize(
    ("threshold", "places"),
    [(0.3, [[1, 3]]), (0.45, [[1, 3]]), (0.6, [[1]]), (0.1, [[0, 1, 3]]), (1.0, [[1]]), (1.01, [[]])],
)
def test_tokens_above_a_share_of_the_fastest(threshold: float, places: list[list[int]]) -> None:
    choice = TokenChoice.moving(*moved([1.0, 8.0, 0.25, 4.0]), threshold)
    assert choice.places.tolist() == places
    assert choice.share == len(places[0]) / 4


def test_every_image_gets_as_many_as_the_busiest() -> None:
    """Filled up with the next fastest: of the second image 0 and 3 move, and 2 comes along."""
    choice = TokenChoice.moving(*moved([1.0, 8.0, 6.0, 7.0], [9.0, 0.1, 2.0, 8.0]), 0.5)
    assert choice.places.tolist() == [[1, 2, 3], [0, 2, 3]]
    assert choice.shared().places.tolist() == [[0, 1, 2, 3]] * 2
    assert choice.shared().share == 1


@pytest.mark.parametrize("threshold", [1e-9, 0.5, 1.0])
def test_where_all_move_alike_or_nothing_does_all_are_evaluated(threshold: float) -> None:
    assert TokenChoice.moving(*moved([2.0, 2.0, 2.0]), threshold) is None
    assert TokenChoice.moving(*moved([0.0, 0.0, 0.0]), threshold) is None


def test_there_is_no_choice_without_a_comparable_step() -> None:
    current, previous = moved([1.0, 2.0])
    assert TokenChoice.moving(current, None, 0.5) is None
    assert TokenChoice.moving(current, previous[:, :1], 0.5) is None


def test_what_is_taken_goes_back_to_its_place() -> None:
    stream = torch.arange(24.0).reshape(2, 4, 3)
    choice = TokenChoice(torch.tensor([[0, 2], [1, 3]]), 4)
    taken = choice.take(stream)
    assert taken[:, :, 0].tolist() == [[0.0, 6.0], [15.0, 21.0]]
    assert torch.equal(choice.put(stream, taken), stream)
    whole = choice.put(stream, -taken)
    assert whole[:, :, 0].tolist() == [[0.0, 3.0, -6.0, 9.0], [12.0, -15.0, 18.0, -21.0]]
    assert float(stream.min()) == 0


# -- all, none, some -----------------------------------------------------------------------------------------------


def all_places(current: torch.Tensor) -> TokenChoice:
    batch, tokens, _ = current.shape
    return TokenChoice(torch.arange(tokens).expand(batch, -1), tokens)


@pytest.mark.parametrize("family", [name for name in SMALL if name not in ("unet", "wan-2.2")])
def test_all_tokens_by_the_partial_path_are_the_whole(toy: Toy) -> None:
    expected = toy.plain_images(STEPS, batch=2)
    partial = []
    original = TokenRunner.evaluate_some

    def evaluate_some(self: TokenRunner, *args: Any) -> Any:
        partial.append(original(self, *args))
        return partial[-1]

    with choosing(all_places), pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenRunner, "evaluate_some", evaluate_some)
        with attached(toy.pipeline, "pipeline", "Fast", rel_l1_thresh=0, motion_threshold=0.5) as engine:
            images = toy.images(STEPS, batch=2)
            assert engine.summary()["hit_rate"] == 0
    assert len(partial) == (STEPS - WARMUP) * len(toy.blocks)
    assert all(tokens.share == 1 for tokens, _ in partial)
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)


Streams = dict[str, torch.Tensor]


@contextmanager
def watching(toy: Toy) -> Iterator[list[list[tuple[Streams, Streams]]]]:
    """Per block, the streams that go into it and come out of it at every step."""
    spec = spec_of(toy.transformer)
    seen: list[list[tuple[Streams, Streams]]] = [[] for _ in toy.blocks]

    def noting(index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = {name: kwargs.get(name) for name in spec.groups[0].takes}
            if inputs["hidden_states"] is None:
                inputs["hidden_states"] = args[0]
            outputs = output if isinstance(output, tuple) else (output,)
            seen[index].append((inputs, dict(zip(spec.groups[0].returns, outputs, strict=True))))

        return note

    with ExitStack() as stack:
        for index, block in enumerate(toy.blocks):
            stack.callback(block.register_forward_hook(noting(index), with_kwargs=True).remove)
        yield seen


def ridge_map(inputs: list[torch.Tensor], residuals: list[torch.Tensor]) -> torch.Tensor:
    """The map of the input's change to the residual's, from the last two steps of the warm-up."""
    change, moved = (each[2].flatten(0, 1).double() - each[1].flatten(0, 1).double() for each in (inputs, residuals))
    square, cross = change.T @ change, change.T @ moved
    ridge = RIDGE * square.diagonal().mean()
    if ridge == 0:  # the text in front of the first block stays as it is
        return torch.zeros_like(cross)
    return torch.linalg.solve(square + ridge * torch.eye(len(square)), cross)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_where_no_token_moves_the_fitted_maps_stand_in(toy: Toy, batch: int) -> None:
    """Above 1 nothing is as fast as that: behind the warm-up every block is its linear map, in every stream."""
    with watching(toy) as seen, attached(toy.pipeline, "pipeline", "Fast", motion_threshold=1.5) as engine:
        toy.images(6, batch=batch)
        summary = engine.summary()
    assert summary["hit_rate"] == pytest.approx(0.5)
    for steps in seen:
        for name in steps[0][0]:
            outputs = [after.get(name) for _, after in steps]
            inputs = [before[name] for before, _ in steps]
            if outputs[0] is None:  # the text, behind SD3's last block
                continue
            residuals = [after - before for before, after in zip(inputs, outputs, strict=True)]
            fitted = ridge_map(inputs, residuals).float()
            for step in (3, 4, 5):
                expected = inputs[step] + residuals[2] + (inputs[step] - inputs[2]) @ fitted
                torch.testing.assert_close(outputs[step], expected, rtol=1e-4, atol=1e-4)
            if name == "hidden_states":
                assert float(((inputs[5] - inputs[2]) @ fitted).abs().max()) > 1e-4


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_tokens_that_stand_still_take_the_fitted_map(toy: Toy) -> None:
    """Their last residual, and the map of what their input has changed since the step before."""

    def half(current: torch.Tensor) -> TokenChoice:
        return TokenChoice(torch.arange(0, current.shape[1], 2).expand(len(current), -1), current.shape[1])

    with watching(toy) as seen, choosing(half):
        with attached(toy.pipeline, "pipeline", "Fast", rel_l1_thresh=0, motion_threshold=0.5):
            toy.images(6, batch=2)
    for steps in seen:
        inputs = [before["hidden_states"] for before, _ in steps]
        residuals = [after["hidden_states"] - before for before, (_, after) in zip(inputs, steps, strict=True)]
        fitted = ridge_map(inputs, residuals).float()
        for step in (3, 4, 5):
            expected = residuals[step - 1] + (inputs[step] - inputs[step - 1]) @ fitted
            torch.testing.assert_close(residuals[step][:, 1::2], expected[:, 1::2], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(residuals[step][:, ::2], expected[:, ::2], rtol=1e-4, atol=1e-4)


# -- counting ------------------------------------------------------------------------------------------------------


# Between the changes that the toys show in 12 steps.
THRESHOLDS = {"dit": 0.1, "flux": 0.048, "pixart": 0.05, "sd3": 0.045}


@pytest.mark.parametrize("blocks_too", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_hit_rate_counts_tokens(toy: Toy, blocks_too: bool) -> None:
    """Tokens that go into the attention modules, text among them where it takes part, against all there are."""
    steps, counted, most = 12, 0, 0
    settings = {"rel_l1_thresh": THRESHOLDS[toy.family] if blocks_too else 0, "significance": 0}
    first = [name for name in spec_of(toy.transformer).groups[0].self_attention][0]

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal counted, most
        hidden = args[0] if args else kwargs["hidden_states"]
        text = kwargs.get("encoder_hidden_states")
        tokens = hidden.shape[1] + (0 if text is None else text.shape[1])
        counted, most = counted + tokens, max(most, tokens)

    with ExitStack() as stack:
        for block in toy.blocks:
            module = getattr(block, first)
            stack.callback(module.register_forward_pre_hook(count, with_kwargs=True).remove)
        engine = stack.enter_context(attached(toy.pipeline, "pipeline", "Fast", motion_threshold=0.4, **settings))
        toy.images(steps, batch=2)
        summary = engine.summary()
    assert summary["hit_rate"] == pytest.approx(1 - counted / (most * len(toy.blocks) * steps), abs=1e-9)
    assert 0 < summary["hit_rate"] < 1
    (plan,) = summary["plan"].values()
    assert any(0 < share < 1 for row in plan for share in row)
    assert any(share == 0 for row in plan for share in row) == blocks_too
    assert 0 < summary["flops_saved"] < 1


def test_tokens_of_each_image_are_its_own(dit: Toy) -> None:
    """Outside shared rotary embeddings an image's tokens are chosen by it: a batch gives what each image gives."""
    pipeline = build_toy_dit()
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 4, 4, 4, generator=generator)
    # In each image another eight tokens move.
    masks = torch.zeros(2, 1, 16)
    masks[0, :, :8], masks[1, :, 4:12] = 1, 1
    directions = torch.randn(2, 4, 4, 4, generator=generator) * masks.reshape(2, 1, 4, 4)

    @torch.no_grad()
    def run(which: slice) -> list[torch.Tensor]:
        with attached(pipeline, "transformer", "Fast", rel_l1_thresh=0, motion_threshold=0.05) as engine:
            outputs = [
                pipeline.transformer(
                    (base + 0.05 * step * directions)[which],
                    timestep=torch.full((2,), 1000 - 50 * step)[which],
                    class_labels=torch.tensor([3, 4])[which],
                ).sample
                for step in range(6)
            ]
            shares.append([row[0] for row in engine.summary()["plan"]["0"]])
        return outputs

    shares: list[list[float]] = []
    together = run(slice(0, 2))
    apart = [run(slice(index, index + 1)) for index in (0, 1)]
    assert shares[0] == shares[1] == shares[2] == [1, 1, 1, 0.5, 0.5, 0.5]
    for step in range(6):
        both = torch.cat([apart[0][step], apart[1][step]])
        torch.testing.assert_close(together[step], both, rtol=1e-4, atol=1e-5)


# -- failing well --------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text
    return text


def test_a_mask_on_image_tokens_is_refused(request: pytest.FixtureRequest) -> None:
    pixart = request.getfixturevalue("_once")("pixart")
    mask = torch.ones(1, 64)
    mask[0, 5] = 0
    original = pixart.transformer.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        batch, _, height, width = args[0].shape
        return original(*args, **kwargs, attention_mask=mask.expand(batch, height * width // 4))

    with wrapped(pixart.transformer, "forward", lambda _: masked):
        with attached(pixart.pipeline, "pipeline", "Fast", motion_threshold=0.3):
            with pytest.raises(RuntimeError) as caught:
                pixart.images(5)
    assert "mask" in one_line(caught.value)


def test_a_mask_does_not_matter_where_tokens_are_not_chosen(request: pytest.FixtureRequest) -> None:
    """PixArt's cross attention has one, which is none of token reduction's business."""
    pixart = request.getfixturevalue("_once")("pixart")
    with attached(pixart.pipeline, "pipeline", "Fast", rel_l1_thresh=0, motion_threshold=0.3) as engine:
        pixart.images(6)
        assert engine.summary()["hit_rate"] > 0


@pytest.mark.parametrize("times", [0, 2])
def test_another_attention_backend_is_refused(dit: Toy, times: int) -> None:
    """Its tokens would attend to the chosen ones alone. Afterwards all is as it was."""
    attention = dit.blocks[2].attn1
    usual = attention.processor

    class Twice(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return (usual(*args, **kwargs) + usual(*args, **kwargs)) / 2

    with attached(dit.pipeline, "pipeline", "Fast", rel_l1_thresh=0, motion_threshold=0.3) as engine:
        expected = dit.images(6)
        attention.processor = AttnProcessor() if times == 0 else Twice()
        try:
            with pytest.raises(RuntimeError) as caught:
                dit.images(6)
        finally:
            attention.processor = usual
        assert "block 2's attn1" in one_line(caught.value) and f"{times} times" in str(caught.value)
        assert np.array_equal(dit.images(6), expected)
        assert engine.summary()["hit_rate"] > 0


def test_a_block_without_attention_is_refused_before_anything_changes() -> None:
    """Half an attachment would be worse than none."""
    transformer = build_toy_dit().transformer
    transformer.transformer_blocks[1].attn1 = None
    before = [dict(vars(module)) for module in transformer.modules()]
    with pytest.raises(TypeError) as caught:
        apply_cache_on_transformer(transformer, "Fast", motion_threshold=0.3)
    assert "block 1" in one_line(caught.value)
    after = [dict(vars(module)) for module in transformer.modules()]
    assert [each.keys() for each in after] == [each.keys() for each in before]
    assert "forward" not in vars(transformer)


def remembered(engine: CacheEngine) -> list[torch.Tensor]:
    return [tensor for branch in engine._branches.values() for tensor in branch.keys.tensors()]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_broken_keys_are_dropped(toy: Toy) -> None:
    """A NaN among the remembered keys makes the next step whole, and tokens are chosen again after it."""
    steps, planted = 9, []

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            planted.append(None)
            if len(planted) == 5:
                remembered(engine)[-1][0, 1, 3, 2] = torch.nan
            return original(*args, **kwargs)

        return step

    with wrapped(toy.scheduler, "step", wrap):
        with attached(toy.pipeline, "pipeline", "Fast", rel_l1_thresh=0, motion_threshold=0.5) as engine:
            images = toy.images(steps)
            summary = engine.summary()
    (plan,) = summary["plan"].values()
    assert np.isfinite(images).all()
    assert summary["non_finite"] == 1
    assert all(share == 1 for share in plan[5])
    assert any(share < 1 for row in plan[6:] for share in row)


def test_the_memory_that_keys_take_is_counted(dit: Toy) -> None:
    settings = {"rel_l1_thresh": 0, "approximation": "residual"}
    with attached(dit.pipeline, "transformer", "Fast", motion_threshold=0.3, **settings) as engine:
        drive(dit.transformer, 5)
        held = sum(tensor.numel() * tensor.element_size() for tensor in remembered(engine))
        with_keys = engine.summary()["memory_bytes"]
    # Keys and values of 16 tokens and 16 channels, twice for the batch, four blocks, four bytes a number.
    assert held == 2 * 2 * 16 * 16 * 4 * 4
    with attached(dit.pipeline, "transformer", "Fast", **settings) as engine:
        drive(dit.transformer, 5)
        assert remembered(engine) == []
        assert with_keys - engine.summary()["memory_bytes"] >= held
