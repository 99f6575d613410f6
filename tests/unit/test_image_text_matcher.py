"""The image-text matcher: ranks by hand, and what it keeps in its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaluation.metrics.matcher import ImageTextMatcher

CAPTIONS = ("red apple", "blue heart", "cat face")


@pytest.fixture
def matcher() -> ImageTextMatcher:
    matcher = ImageTextMatcher(CAPTIONS)
    matcher.projection = torch.randn(matcher.projection.shape, generator=torch.Generator().manual_seed(0)) / 100
    return matcher


def test_ranks_are_counts_of_captions_that_fit_better(matcher: ImageTextMatcher) -> None:
    images = torch.rand(2, 3, 64, 64)
    seen = matcher(images)
    # Row 1 is the first image itself, row 0 its opposite, row 2 between the two.
    matcher.table.copy_(torch.stack([-seen[0], seen[0], 0.1 * seen[0]]))
    assert matcher.ranks(images[[0, 0, 0]], CAPTIONS).tolist() == [2, 0, 1]
    assert torch.allclose(seen.norm(dim=1), torch.ones(2), atol=1e-5)


def test_images_of_any_size_are_resized(matcher: ImageTextMatcher) -> None:
    flat = torch.full((1, 3, 1, 1), 0.3)
    assert torch.allclose(matcher(flat.expand(1, 3, 32, 32)), matcher(flat.expand(1, 3, 64, 64)), atol=1e-5)


def test_what_was_saved_is_loaded(matcher: ImageTextMatcher, tmp_path: Path) -> None:
    matcher.table.copy_(torch.randn(3, 128))
    matcher.save(tmp_path / "matcher.safetensors")
    loaded = ImageTextMatcher.load(tmp_path / "matcher.safetensors")
    images = torch.rand(2, 3, 64, 64)
    assert loaded.captions == list(CAPTIONS)
    assert torch.allclose(loaded(images), matcher(images), atol=5e-3)
    assert torch.equal(loaded.table, matcher.table.half().float())


def test_it_learns_what_images_of_a_caption_have_in_common() -> None:
    """Captions are 130 directions of 150 features; two more, of ten times their size, tell images alone apart."""
    generator = torch.Generator().manual_seed(0)
    captions = [f"caption {number}" for number in range(130)]
    matcher = ImageTextMatcher(captions)
    meant = torch.zeros(130, matcher.projection.shape[0])
    meant[:, :130] = torch.eye(130)

    def seen() -> torch.Tensor:
        features = meant + 0.01 * torch.randn(meant.shape, generator=generator)
        features[:, 140:142] += 10 * torch.randn(130, 2, generator=generator)
        return features

    matcher.features = lambda images: images.flatten(1)  # type: ignore[method-assign]
    matcher.fit(torch.cat([seen(), seen()]), captions * 2)
    assert matcher.ranks(seen(), captions).max() == 0
    with pytest.raises(ValueError, match="two of some"):
        matcher.fit(seen(), captions)


def test_what_it_cannot_judge_is_refused(matcher: ImageTextMatcher) -> None:
    with pytest.raises(ValueError, match="does not know 'green pear'"):
        matcher.ranks(torch.rand(1, 3, 64, 64), ["green pear"])
    with pytest.raises(ValueError, match=r"\(1, 1, 64, 64\); expected \[N, 3, H, W\]"):
        matcher(torch.rand(1, 1, 64, 64))
