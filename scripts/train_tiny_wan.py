"""Train ``tiny-wan``, a small Wan that makes clips of an emoji moving over a light ground, from a text.

Stages, each chosen with --stages (all by default); trainings resume from their checkpoints:

- ``autoencoder``: an AutoencoderKLWan: 13 frames of 64 x 64 pixels become 4 x 4 x 4 latents of 32 channels.
- ``transformer``: a WanTransformer3DModel on 64 tokens, which foretells noise - x at logit-normal times (rectified
  flow; Esser et al., arXiv 2403.03206). A tenth of the phrases are dropped (classifier-free guidance, arXiv
  2207.12598). Its text encoder is tiny-flux's T5, frozen.
- ``decoder``: the autoencoder's second half alone, for as long as there is time.
- ``export``: a diffusers.WanPipeline folder in half precision. Text encoder and tokenizer are linked (shared.json) to
  the tiny-flux beside it; what the checker looks for lies in ``evaluation``.
- ``judge``: how often the object and its direction are right, for pairs of them that were trained on and for others.

    python scripts/train_tiny_wan.py --data emoji64.npz --output xfuser/assets/tiny-wan

The clips are composed by rule (scripts/tiny_wan_clips.py): 32 objects in 4 directions, of which 16 pairs are held out.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_wan_clips import FRAMES, SIZE, Sprites, draw_clips, load_sprites, phrase_of, split_pairs
from tiny_wan_parts import (
    EagerAttention,
    Text,
    build_autoencoder,
    build_scheduler,
    build_transformer,
    decode_unclamped,
)
from torch import nn
from training import (
    Training,
    add_run_arguments,
    add_stage_arguments,
    add_start_argument,
    begin,
    checkpoint,
    finish_export,
    origin,
    plan_stage,
    settled,
    started,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_judging import add_judging_arguments  # noqa: E402
from tiny_wan_judging import judge, save_objects  # noqa: E402

from xfuser.core.files import replacing  # noqa: E402
from xfuser.model_executor.pipelines.shipped import INDEX, shipped_types  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("autoencoder", "transformer", "decoder", "export", "judge")
CROP, CROP_FRAMES = 32, 5
IMAGE_STEPS = 400  # of the autoencoder, which sees single frames at first
LINKED = {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}
CREDITS = """# tiny-wan

A small `WanPipeline`, made by `scripts/train_tiny_wan.py`. It was trained on clips composed by rule, in which one of 32
emoji in the style of Twemoji (CC-BY 4.0, Twitter, Inc and other contributors) moves over a light ground. Its text
encoder is tiny-flux's.
"""


def distance(decoded: torch.Tensor, target: torch.Tensor, sharpness: float = 1.0) -> torch.Tensor:
    """Squared errors of colours and of hues, and by ``sharpness`` absolute ones of colours and edges."""
    # Rare colours come back grey unless the hue counts for itself.
    hue, wanted = (F.avg_pool3d(each - each.mean(dim=1, keepdim=True), (1, 4, 4)) for each in (decoded, target))
    squares = F.mse_loss(decoded, target) + 4 * F.mse_loss(hue, wanted)
    edges = sum(F.l1_loss(decoded.diff(dim=d), target.diff(dim=d)) for d in (3, 4))
    return 4 * squares + sharpness * (F.l1_loss(decoded, target) + edges)


def train_autoencoder(args: argparse.Namespace, sprites: Sprites) -> AutoencoderKLWan:
    """Train the autoencoder, on parts of single frames at first, then on clips and parts of them."""
    plan = args.plan("autoencoder", steps=args.autoencoder_steps, learning_rate=5e-4, ema=0.99, batch_size=64)
    training = Training("autoencoder", started(args, "vae", build_autoencoder()), plan)
    vae = training.module
    pairs = split_pairs(sprites.names)[0]

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        images = training.step < IMAGE_STEPS
        whole = not images and torch.rand((), generator=generator) < 0.3
        chosen = indices if images else indices[:2] if whole else indices[:16]
        target = draw_clips(sprites, [pairs[index] for index in chosen], generator)
        if not whole:
            # Small parts of many clips teach more than few whole ones, which show the attention whole frames.
            length = 1 if images else CROP_FRAMES
            first = 4 * int(torch.randint(0, FRAMES // 4, (), generator=generator))
            top, left = (16 * torch.randint(0, (SIZE - CROP) // 16 + 1, (2,), generator=generator)).tolist()
            target = target[:, :, first : first + length, top : top + CROP, left : left + CROP]
        target = target * 2 - 1
        with args.autocast():
            posterior = vae.encode(target).latent_dist
        posterior = DiagonalGaussianDistribution(posterior.parameters.float())
        with args.autocast():
            decoded = decode_unclamped(vae, posterior.sample(generator=generator)).float()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        # Absolute errors are least, at first, for an even grey, and the latents are never learnt to be used.
        sharpness = min(1.0, max(0.0, training.step / IMAGE_STEPS - 1))
        return distance(decoded, target, sharpness) + 1e-3 * divergence

    training.run(loss_at, len(pairs))
    return training.averaged()


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Latents [N, 32, 4, 4, 4] of clips [N, 3, 13, 64, 64] in [0, 1], as the autoencoder gives them."""
    return vae.encode(clips * 2 - 1).latent_dist.mode()


def bank_of_clips(args: argparse.Namespace, vae: AutoencoderKLWan, sprites: Sprites) -> dict[str, torch.Tensor]:
    """Clips of the trained pairs in turn (uint8), and their latents, kept while the autoencoder is not trained on."""
    path = args.workdir / "clips.safetensors"
    made_of = f"{args.clips} {origin(args, 'autoencoder', 'vae')}"
    if path.exists():
        with safe_open(path, framework="pt") as opened:
            same = (opened.metadata() or {}).get("made_of") == made_of
        if same:
            return load_file(path)
    pairs = split_pairs(sprites.names)[0]
    generator = torch.Generator().manual_seed((args.seed + 1) * 1_000_003)
    clips = draw_clips(sprites, [pairs[place % len(pairs)] for place in range(args.clips)], generator)
    latents = torch.cat([encode_clips(vae, each) for each in track(clips.split(8), description="latents     ")])
    bank = {"latents": latents, "clips": (clips * 255).round().byte()}
    with replacing(path) as temporary:
        save_file(bank, temporary, metadata={"made_of": made_of})
    return bank


def train_decoder(args: argparse.Namespace, vae: AutoencoderKLWan, sprites: Sprites) -> None:
    """Train the autoencoder's second half alone, which leaves the latents as the transformer knows them."""
    plan = args.plan("decoder", steps=args.decoder_steps, learning_rate=5e-4, ema=0.99, batch_size=6)
    training = Training("decoder", nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True), plan)
    bank = bank_of_clips(args, vae, sprites)
    spread = 0.05 * bank["latents"].std(dim=(0, 2, 3, 4), keepdim=True)

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        whole = torch.rand((), generator=generator) < 0.5
        chosen, length = (indices[:3], FRAMES) if whole else (indices, CROP_FRAMES)
        latents = bank["latents"][chosen, :, : length // 4 + 1]
        # What a transformer makes is not quite what the encoder does.
        latents = latents + spread[0] * torch.randn(latents.shape, generator=generator)
        with args.autocast():
            decoded = decode_unclamped(vae, latents).float()
        return distance(decoded, bank["clips"][chosen, :, :length].float() / 127.5 - 1)

    training.run(loss_at, len(bank["latents"]))
    training.averaged()


def scale_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Note each channel's mean and deviation in the autoencoder's configuration; the latents in those units."""
    mean, deviation = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return (latents - mean[:, None, None, None]) / deviation[:, None, None, None]


def train_transformer(
    args: argparse.Namespace, vae: AutoencoderKLWan, sprites: Sprites, text: Text
) -> WanTransformer3DModel:
    """Train the transformer on latents of clips, from phrases of which a tenth are dropped."""
    plan = args.plan(
        "transformer", steps=args.transformer_steps, learning_rate=args.rate, ema=args.ema, batch_size=args.batch_size
    )
    transformer = started(args, "transformer", build_transformer(text.channels))
    transformer.set_attn_processor(EagerAttention())
    training = Training("transformer", transformer, plan)
    latents = scale_latents(vae, bank_of_clips(args, vae, sprites)["latents"])
    pairs = split_pairs(sprites.names)[0]

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count = len(indices)
        dropped = (torch.rand(count, generator=generator) < 0.1).tolist()
        said = [phrase_of(pairs[index % len(pairs)], generator) for index in indices.tolist()]
        said = ["" if drop else each for each, drop in zip(said, dropped, strict=True)]
        clean = latents[indices]
        noise = torch.randn(clean.shape, generator=generator)
        time = torch.randn(count, generator=generator).sigmoid()
        noisy = torch.lerp(clean, noise, time[:, None, None, None, None])
        with args.autocast():
            velocity = training.module(noisy, time * 1000, text.encode(said)).sample
        return F.mse_loss(velocity.float(), noise - clean)

    training.run(loss_at, len(latents))
    return training.averaged()


def export(
    args: argparse.Namespace, vae: AutoencoderKLWan, text: Text, transformer: WanTransformer3DModel, sprites: Sprites
) -> None:
    """Write the pipeline in half precision; what lies in a model beside it is linked."""
    pipeline = WanPipeline(
        tokenizer=text.tokenizer,
        text_encoder=text.encoder.half(),
        vae=vae.half(),
        scheduler=build_scheduler(),
        transformer=transformer.half(),
    )
    pipeline.save_pretrained(args.output, safe_serialization=True)
    save_objects(sprites, args.output)
    finish_export(args.output, CREDITS, args.parts, LINKED)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument)
    add_stage_arguments(parser, "tiny-wan", STAGES)
    add_start_argument(parser)
    add(
        "--parts",
        type=Path,
        default=shipped_types()["tiny-flux"],
        help="a tiny-flux, whose T5 reads the text (default: the one in the package)",
    )
    add("--autoencoder_steps", type=int, default=6000, help="batches (default: %(default)s)")
    add("--decoder_steps", type=int, default=4000, help="batches (default: %(default)s)")
    add("--transformer_steps", type=int, default=20000, help="batches (default: %(default)s)")
    add("--rate", type=float, default=1e-3, help="learning rate of the transformer (default: %(default)s)")
    add("--clips", type=int, default=1344, help="composed for the transformer's training (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="clips a batch of the transformer (default: %(default)s)")
    add("--ema", type=float, default=0.998, help="decay of the transformer's averaged weights (default: %(default)s)")
    images = ROOT / "docs" / "images"
    add_judging_arguments(parser, 50, 5.0, images / "tiny_wan_samples.png", judged=96)
    add("--animation", type=Path, default=images / "tiny_wan.webp", help="the same, moving (default: %(default)s)")
    add_run_arguments(parser)
    args = settled(parser)
    if not (args.parts / INDEX).is_file():
        parser.error(f"--parts {args.parts}: expected a tiny-flux ({INDEX}); name one")
    return args


def main() -> None:
    args = parse_args()
    begin(args)
    sprites = load_sprites(args.data)
    args.plan = partial(plan_stage, args)
    vae = train_autoencoder(args, sprites)
    if "decoder" in args.stages or checkpoint(args, "decoder").exists():
        train_decoder(args, vae, sprites)
    if {"transformer", "export"} & set(args.stages):
        text = Text.load(args.parts)
        transformer = train_transformer(args, vae, sprites, text)
    if "export" in args.stages:
        export(args, vae, text, transformer, sprites)
    if "judge" in args.stages:
        judge(args, vae.float(), sprites)


if __name__ == "__main__":
    main()
