"""The text side of ``tiny-flux``: its text encoders, and the image-text matcher that judges what is drawn."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from rich.progress import track
from tiny_flux_parts import SIZE, THUMBNAIL, Emoji, Phrases, TextEncoders, train_tokenizer
from training import Training
from transformers import PreTrainedTokenizerFast

from evaluation.metrics.matcher import ImageTextMatcher
from xfuser.core.files import replacing

TOP = 10


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


def train_matcher(args: argparse.Namespace, emoji: Emoji) -> ImageTextMatcher:
    """Learn the matcher from all images that are not held out, or read it where that stage is not to run."""
    path = args.workdir / "matcher.safetensors"
    if "matcher" not in args.stages:
        if not path.exists():
            raise SystemExit(f"stage matcher has no checkpoint in {args.workdir}; add it to --stages")
        return ImageTextMatcher.load(path)
    matcher = ImageTextMatcher(sorted(set(emoji.captions)))
    usable = emoji.trained_on.tolist()
    batches = torch.tensor(usable).split(64)
    features = [matcher.features(unit(emoji.images[batch])) for batch in track(batches, description="matcher     ")]
    matcher.fit(torch.cat(features), [emoji.captions[index] for index in usable])
    with replacing(path) as temporary:
        matcher.save(temporary)
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
