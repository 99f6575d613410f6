"""The first stages of ``tiny-flux``: text encoders and image-text matcher, trained together, and the matcher's bar."""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from tiny_flux_parts import SIZE, THUMBNAIL, Emoji, Phrases, TextEncoders, train_tokenizer
from torch import nn
from training import Training
from transformers import PreTrainedTokenizerFast

from xfuser.metrics.matcher import ImageTextMatcher

TOP = 10


def unit(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 as floats in [0, 1]."""
    return images.float() / 255


def vary(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shift, recolour and blur images of shape [N, 3, 64, 64] in [0, 1]; none is mirrored.

    Left and right are words of the captions. The two styles differ in outline, shade and size, and generated images
    are softer than drawn ones: these are the differences that the matcher has to look past.
    """
    count = len(images)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(count, *shape, generator=generator)  # noqa: E731
    angle, scale, shift = uniform(-0.2, 0.2), uniform(0.85, 1.2), uniform(-0.12, 0.12, 2)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).view(count, 2, 3)
    affine[:, 0] *= uniform(0.9, 1.1, 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False)
    grey = ink.mean(dim=1, keepdim=True)
    ink = grey + (ink - grey) * uniform(0.7, 1.3, 1, 1, 1)
    ink = ink * uniform(0.8, 1.2, 3, 1, 1)
    soft = F.avg_pool2d(ink, 3, stride=1, padding=1)
    ink = torch.lerp(ink, soft, uniform(-0.3, 1.0, 1, 1, 1))
    return (1 - ink).clamp(0, 1)


def train_text(args: argparse.Namespace, emoji: Emoji) -> tuple[TextEncoders, ImageTextMatcher]:
    """Train both text encoders and the matcher: phrases find their images, and foretell their thumbnails.

    The thumbnails are what makes the transformer's training cheap: colours and layout are then known to the text
    encoders, which cost little to train. Images that are held out are seen by none of them.
    """
    phrases = Phrases(emoji)
    text = TextEncoders(*kept_tokenizers(args, phrases))
    matcher = ImageTextMatcher(sorted(set(emoji.captions)))
    both = nn.ModuleDict({"text": text, "matcher": matcher})
    training = Training(
        "text", both, args.plan("text", steps=args.text_steps, learning_rate=2e-3, ema=0.98, batch_size=128)
    )
    numbers = torch.tensor([matcher.numbers[caption] for caption in emoji.captions])
    usable = emoji.trained_on
    thumbnails = 2 - 2 * F.avg_pool2d(unit(emoji.images), SIZE // THUMBNAIL)
    if training.step == 0:
        matcher.table.copy_(embed_captions(text, matcher.captions))

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen = usable[indices]
        number = numbers[chosen]
        with args.autocast():
            seen = matcher(vary(unit(emoji.images[chosen]), generator)).float()
            embeddings, drawn = text.describe(phrases(chosen, generator))
        told = F.normalize(sum(each.float() for each in embeddings), dim=1)
        # Captions outside of the batch stand as they were when last read.
        table = matcher.table.clone().index_put((number,), told)
        scale = text.log_scale.exp().clamp(max=50)
        finds_caption = F.cross_entropy(scale * seen @ table.T, number, label_smoothing=0.05)
        twins = (number[:, None] == number[None]) & ~torch.eye(len(number), dtype=torch.bool)
        finds_image = F.cross_entropy((scale * told @ seen.T).masked_fill(twins, -math.inf), torch.arange(len(number)))
        foretold = sum(F.mse_loss(each.float(), thumbnails[chosen]) for each in drawn)
        with torch.no_grad():
            matcher.table.index_copy_(0, number, told.detach())
        return finds_caption + 0.5 * finds_image + args.thumbnail_weight * foretold

    training.run(loss_at, len(usable))
    training.averaged()
    matcher.table.copy_(embed_captions(text, matcher.captions))
    return text, matcher


def kept_tokenizers(args: argparse.Namespace, phrases: Phrases) -> list[PreTrainedTokenizerFast]:
    """The tokenizers of CLIP and T5, learnt once and kept in the working folder: checkpoints belong to them."""
    kept = []
    for name, clip in (("tokenizer", True), ("tokenizer_2", False)):
        folder = args.workdir / name
        if not folder.exists():
            train_tokenizer(phrases.corpus(), clip=clip).save_pretrained(folder)
        kept.append(PreTrainedTokenizerFast.from_pretrained(folder))
    return kept


@torch.no_grad()
def embed_captions(text: TextEncoders, captions: list[str]) -> torch.Tensor:
    """Captions in the matcher's space, by both encoders, [M, 64]."""
    rows = [sum(text.describe(captions[start : start + 256])[0]) for start in range(0, len(captions), 256)]
    return F.normalize(torch.cat(rows), dim=1)


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
