"""The image-text matcher: ranks by hand, and what it keeps in its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaluation.metrics.matcher import ImageTextMatcher

CAPTIONS = ("red apple", "blue heart", "cat face")


@pytest.fixture
def matcher() -> ImageTextMatcher:
    torch.manual_seed(0)
    return ImageTextMatcher(CAPTIONS).eval().requires_grad_(False)


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
    matcher.table.copy_(torch.randn(3, 64))
    matcher.save(tmp_path / "matcher.safetensors")
    loaded = ImageTextMatcher.load(tmp_path / "matcher.safetensors")
    images = torch.rand(2, 3, 64, 64)
    assert loaded.captions == list(CAPTIONS)
    assert torch.allclose(loaded(images), matcher(images), atol=5e-3)
    assert torch.equal(loaded.table, matcher.table.half().float())


def test_what_it_cannot_judge_is_refused(matcher: ImageTextMatcher) -> None:
    with pytest.raises(ValueError, match="does not know 'green pear'"):
        matcher.ranks(torch.rand(1, 3, 64, 64), ["green pear"])
    with pytest.raises(ValueError, match=r"\(1, 1, 64, 64\); expected \[N, 3, H, W\]"):
        matcher(torch.rand(1, 1, 64, 64))
