"""What the trainings of small text-to-image models with tiny-flux's parts have in common: latents, stages, phrases."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_flux_parts import Emoji, Phrases
from torch import nn
from train_tiny_flux import encode_images
from training import Loss, Training, checkpoint, noised

from xfuser.core.files import replacing

COARSE = "coarse"  # the stage on latents of half the size
Foretell = Callable[[torch.Tensor, torch.Tensor, list[str]], torch.Tensor]


def add_denoiser_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how the denoiser learns, and which matcher judges what it draws."""
    add = parser.add_argument
    add("--rate", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="images a batch (default: %(default)s)")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights (default: %(default)s)")
    add("--matcher", type=Path, help="of the stage judge (default: evaluation/matcher.safetensors in --parts)")


def settle_matcher(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Choose the matcher where none is named, and refuse one that is not there in one line."""
    args.matcher = args.matcher or args.parts / "evaluation" / "matcher.safetensors"
    if "judge" in args.stages and not args.matcher.is_file():
        parser.error(f"--matcher: no file {args.matcher}; name one, or leave judge out of --stages")


def encoded(args: argparse.Namespace, vae: AutoencoderKL, emoji: Emoji) -> torch.Tensor:
    """The latents of all images, kept in the working folder for as long as autoencoder and images are the same."""
    path = args.workdir / "latents.safetensors"
    digest = hashlib.sha256(emoji.images.numpy().tobytes())
    for value in vae.state_dict().values():
        digest.update(value.numpy().tobytes())
    made_of = digest.hexdigest()
    if path.exists():
        with safe_open(path, framework="pt") as opened:
            if (opened.metadata() or {}).get("made_of") == made_of:
                return opened.get_tensor("latents")
    latents = encode_images(vae, emoji.images)
    with replacing(path) as temporary:
        save_file({"latents": latents}, temporary, metadata={"made_of": made_of})
    return latents


def train_denoiser(
    args: argparse.Namespace,
    stages: Mapping[str, int],
    denoiser: nn.Module,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    emoji: Emoji,
    foretell: Foretell,
) -> None:
    """Train a denoiser's stages in turn, each from the weights that the one before it left; it ends averaged.

    Args:
        args: The command line.
        stages: Their names, with the step that each ends at. The last is read for an export; others that are not to
            run, where they have a checkpoint.
        denoiser: What learns.
        scheduler: How noise is added, and what is foretold.
        latents: Of all images.
        emoji: The images' captions.
        foretell: Gives the denoiser's answer to noisy latents, times and phrases, of which a tenth are empty.
    """
    *_, last = stages
    wanted = {*args.stages, last} if "export" in args.stages else set(args.stages)
    phrases, usable = Phrases(emoji), emoji.trained_on

    def loss_of(latents: torch.Tensor) -> Loss:
        def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            chosen = usable[indices]
            dropped = (torch.rand(len(indices), generator=generator) < 0.1).tolist()
            said = ["" if drop else each for each, drop in zip(phrases(chosen, generator), dropped, strict=True)]
            noisy, times, target = noised(scheduler, latents[chosen], generator)
            with args.autocast():
                foretold = foretell(noisy, times, said)
            return F.mse_loss(foretold.float(), target)

        return loss_at

    pooled = F.avg_pool2d(latents, 2)
    for stage, steps in stages.items():
        if stage not in wanted and not checkpoint(args, stage).exists():
            continue
        plan = args.plan(stage, steps=steps, learning_rate=args.rate, ema=args.ema, batch_size=args.batch_size)
        training = Training(stage, denoiser.train().requires_grad_(True), plan)
        training.run(loss_of(pooled / pooled.std() if stage == COARSE else latents), len(usable))
        training.averaged()
