"""The text side of ``tiny-flux``: its text encoders, and the image-text matcher that judges what is drawn."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from tiny_flux_parts import CLIP_HIDDEN, SIZE, T5_HIDDEN, THUMBNAIL, Emoji, Phrases, TextEncoders, train_tokenizer
from torch import nn
from training import Training
from transformers import PreTrainedTokenizerFast

from evaluation.metrics.matcher import EMBEDDING_DIM, ImageTextMatcher

TOP = 10
SCALE = 20.0  # of likenesses in the matcher's softmax


def unit(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 as floats in [0, 1]."""
    return images.float() / 255


def kept_tokenizers(args: argparse.Namespace, phrases: Phrases) -> list[PreTrainedTokenizerFast]:
    """The tokenizers of CLIP and T5, learnt once and kept in the working folder: checkpoints belong to them."""
    kept = []
    for name, clip in (("tokenizer", True), ("tokenizer_2", False)):
        folder = args.workdir / name
        if not folder.exists():
            train_tokenizer(phrases.corpus(), clip=clip).save_pretrained(folder)
        kept.append(PreTrainedTokenizerFast.from_pretrained(folder))
    return kept


def train_text(args: argparse.Namespace, emoji: Emoji) -> TextEncoders:
    """Train both text encoders to foretell the thumbnails of the images that phrases describe.

    This is what makes the transformer's training cheap: colours and layout are then known to encoders that cost
    little to train. Images that are held out are not among them.
    """
    phrases = Phrases(emoji)
    text = TextEncoders(*kept_tokenizers(args, phrases))
    plan = args.plan("text", steps=args.text_steps, learning_rate=2e-3, ema=0.99, batch_size=128)
    training = Training("text", text, plan)
    usable = emoji.trained_on
    thumbnails = 2 - 2 * F.avg_pool2d(unit(emoji.images), SIZE // THUMBNAIL)

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen = usable[indices]
        with args.autocast():
            drawn = text.thumbnails(phrases(chosen, generator))
        return sum(F.mse_loss(each.float(), thumbnails[chosen]) for each in drawn)

    training.run(loss_at, len(usable))
    return training.averaged()


def vary(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shift, recolour and blur images of shape [N, 3, 64, 64] in [0, 1]; none is mirrored.

    Left and right are words of the captions. The two styles differ in outline, shade and size, and generated images
    are softer than drawn ones: these are the differences that the matcher has to look past.
    """
    count = len(images)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(count, *shape, generator=generator)  # noqa: E731
    angle, scale, shift = uniform(-0.15, 0.15), uniform(0.85, 1.15), uniform(-0.1, 0.1, 2)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).view(count, 2, 3)
    affine[:, 0] *= uniform(0.9, 1.1, 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False)
    grey = ink.mean(dim=1, keepdim=True)
    ink = grey + (ink - grey) * uniform(0.7, 1.3, 1, 1, 1)
    ink = ink * uniform(0.85, 1.15, 3, 1, 1)
    soft = F.avg_pool2d(ink, 3, stride=1, padding=1)
    ink = torch.lerp(ink, soft, uniform(-0.3, 1.0, 1, 1, 1))
    return (1 - ink).clamp(0, 1)


class MatcherTraining(nn.Module):
    """The matcher and the map from the text encoders' vectors into its space."""

    def __init__(self, captions: list[str]) -> None:
        super().__init__()
        self.matcher = ImageTextMatcher(captions)
        self.into_space = nn.Sequential(
            nn.Linear(CLIP_HIDDEN + T5_HIDDEN, 256),
            nn.GELU(),
            nn.Linear(256, EMBEDDING_DIM),
            nn.BatchNorm1d(EMBEDDING_DIM),
        )

    def table(self, vectors: torch.Tensor) -> torch.Tensor:
        """Captions in the matcher's space, [M, 64], from their vectors [M, 224]."""
        return F.normalize(self.into_space(vectors), dim=1)


def train_matcher(args: argparse.Namespace, emoji: Emoji, text: TextEncoders) -> ImageTextMatcher:
    """Train the matcher contrastively: each image finds its caption among all, and its twin of the other style."""
    both = MatcherTraining(sorted(set(emoji.captions)))
    matcher = both.matcher
    plan = args.plan("matcher", steps=args.matcher_steps, learning_rate=2e-3, ema=0.99, batch_size=96)
    training = Training("matcher", both, plan)
    vectors = text.vectors(matcher.captions)
    numbers = torch.tensor([matcher.numbers[caption] for caption in emoji.captions])
    usable = emoji.trained_on
    twins = {number: (index, index) for index, number in zip(usable.tolist(), numbers[usable].tolist(), strict=True)}
    for index in usable.tolist():
        twins[int(numbers[index])] = (twins[int(numbers[index])][0], index)
    pairs = torch.tensor([twins[number] for number in sorted(twins)])

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # One after the other, a caption's twins; where it has one image, that one in two variations.
        chosen = pairs[indices.unique()].T.flatten()
        with args.autocast():
            seen = matcher(vary(unit(emoji.images[chosen]), generator)).float()
        finds_caption = F.cross_entropy(SCALE * seen @ both.table(vectors).T, numbers[chosen], label_smoothing=0.05)
        first, second = seen.chunk(2)
        likeness = SCALE * first @ second.T
        here = torch.arange(len(first))
        finds_twin = F.cross_entropy(likeness, here) + F.cross_entropy(likeness.T, here)
        return finds_caption + 0.5 * finds_twin

    training.run(loss_at, len(pairs))
    training.averaged()
    matcher.table.copy_(both.table(vectors))
    return matcher


def found(matcher: ImageTextMatcher, images: torch.Tensor, captions: list[str]) -> float:
    """The share of images whose caption is among the ten that fit best, of all."""
    return (matcher.ranks(images, captions) < TOP).double().mean().item()


def report_matcher(emoji: Emoji, matcher: ImageTextMatcher) -> dict[str, float]:
    """Print and return how the matcher does on images held out, and on as many that it was trained on."""
    shares = {}
    for name, mask in (("held out", emoji.held_out), ("trained on", ~emoji.held_out)):
        indices = mask.nonzero()[:, 0][: int(emoji.held_out.sum())].tolist()
        shares[name] = found(matcher, unit(emoji.images[indices]), [emoji.captions[index] for index in indices])
        print(f"matcher      {len(indices)} real images {name}: caption in its top {TOP}: {shares[name]:.3f}")
    return shares
