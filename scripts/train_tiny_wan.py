"""Train ``tiny-wan``, a small Wan that makes clips of an emoji moving over a light ground, from a text.

Stages, each chosen with --stages (all by default); trainings resume from their checkpoints:

- ``autoencoder``: an AutoencoderKLWan: 13 frames of 64 x 64 pixels become 4 x 4 x 4 latents of 32 channels.
- ``transformer``: a WanTransformer3DModel on 64 tokens, which foretells noise - x at logit-normal times (rectified
  flow; Esser et al., arXiv 2403.03206). A tenth of the phrases are dropped (classifier-free guidance, arXiv
  2207.12598). Its text encoder is tiny-flux's T5, frozen.
- ``export``: a diffusers.WanPipeline folder in half precision. Text encoder and tokenizer are linked (shared.json) to
  the tiny-flux beside it; what the checker looks for lies in ``evaluation``.
- ``judge``: how often the object and its direction are right, for pairs of them that were trained on and for others.

    python scripts/train_tiny_wan.py --data emoji64.npz --output xfuser/assets/tiny-wan

The clips are composed by rule (scripts/tiny_wan_clips.py): 32 objects in 4 directions, of which 16 pairs are held out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from rich.progress import track
from safetensors.torch import load_file, save_file
from tiny_wan_clips import Sprites, draw_clips, load_sprites, phrase_of, split_pairs
from tiny_wan_parts import (
    EagerAttention,
    Text,
    build_autoencoder,
    build_scheduler,
    build_transformer,
    decode_unclamped,
)
from train_tiny_flux import plan_stage
from training import Training, add_run_arguments, autocast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_wan_judging import add_judging_arguments, judge, save_objects  # noqa: E402

from xfuser.core.files import replacing, write_text  # noqa: E402
from xfuser.model_executor.pipelines.shipped import INDEX, SHARED, shipped_types  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("autoencoder", "transformer", "export", "judge")
LINKED = {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}
CREDITS = """# tiny-wan

A small `WanPipeline`, made by `scripts/train_tiny_wan.py`. It was trained on clips composed by rule, in which one of 32
emoji in the style of Twemoji (CC-BY 4.0, Twitter, Inc and other contributors) moves over a light ground. Its text
encoder is tiny-flux's.
"""


def train_autoencoder(args: argparse.Namespace, sprites: Sprites) -> AutoencoderKLWan:
    """Train the autoencoder on composed clips."""
    plan = args.plan("autoencoder", steps=args.autoencoder_steps, learning_rate=1.5e-3, ema=0.99, batch_size=2)
    training = Training("autoencoder", build_autoencoder(), plan)
    vae = training.module
    pairs = split_pairs(sprites.names)[0]

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        target = draw_clips(sprites, [pairs[index] for index in indices], generator)
        target = target * 2 - 1
        with args.autocast():
            posterior = vae.encode(target).latent_dist
        posterior = DiagonalGaussianDistribution(posterior.parameters.float())
        with args.autocast():
            decoded = decode_unclamped(vae, posterior.sample(generator=generator)).float()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        squares = F.mse_loss(decoded, target)
        # Absolute errors are least, at first, for an even grey, and the latents are never learnt to be used.
        sharpness = min(1.0, training.step / 600)
        edges = sum(F.l1_loss(decoded.diff(dim=d), target.diff(dim=d)) for d in (3, 4))
        return 4 * squares + sharpness * (F.l1_loss(decoded, target) + edges) + 1e-3 * divergence

    training.run(loss_at, len(pairs))
    return training.averaged()


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Latents [N, 32, 4, 4, 4] of clips [N, 3, 13, 64, 64] in [0, 1], as the autoencoder gives them."""
    return vae.encode(clips * 2 - 1).latent_dist.mode()


def bank_of_latents(args: argparse.Namespace, vae: AutoencoderKLWan, sprites: Sprites) -> torch.Tensor:
    """Latents of clips of the trained pairs in turn, kept for as long as the autoencoder is not trained on."""
    path, made_by = args.workdir / "latents.safetensors", args.workdir / "autoencoder.safetensors"
    if path.exists() and path.stat().st_mtime >= made_by.stat().st_mtime:
        latents = load_file(path)["latents"]
        if len(latents) == args.clips:
            return latents
    pairs = split_pairs(sprites.names)[0]
    batches = []
    for start in track(range(0, args.clips, 8), description="latents     "):
        generator = torch.Generator().manual_seed((args.seed + 1) * 1_000_003 + start)
        chosen = [pairs[place % len(pairs)] for place in range(start, min(start + 8, args.clips))]
        batches.append(encode_clips(vae, draw_clips(sprites, chosen, generator)))
    latents = torch.cat(batches)
    with replacing(path) as temporary:
        save_file({"latents": latents}, temporary)
    return latents


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
        "transformer", steps=args.transformer_steps, learning_rate=1.5e-3, ema=args.ema, batch_size=args.batch_size
    )
    transformer = build_transformer(text.channels)
    transformer.set_attn_processor(EagerAttention())
    training = Training("transformer", transformer, plan)
    latents = scale_latents(vae, bank_of_latents(args, vae, sprites))
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
    (args.output / SHARED).unlink(missing_ok=True)
    flux = args.parts.resolve()
    if flux.parent == args.output.resolve().parent:
        links = {part: f"{flux.name}/{theirs}" for part, theirs in LINKED.items()}
        write_text(args.output / SHARED, json.dumps(links, indent=2) + "\n")
        for part in LINKED:
            shutil.rmtree(args.output / part)
    write_text(args.output / "README.md", CREDITS)
    save_objects(sprites, args.output)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"export       {args.output}: {size / 1e6:.2f} MB")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument)
    add("--data", type=Path, required=True, help="emoji64.npz (images, captions, styles)")
    add(
        "--parts",
        type=Path,
        default=shipped_types()["tiny-flux"],
        help="a tiny-flux, whose T5 reads the text (default: the one in the package)",
    )
    add("--output", type=Path, default=ROOT / "outputs" / "tiny-wan" / "model", help="folder (default: %(default)s)")
    add("--workdir", type=Path, default=ROOT / "outputs" / "tiny-wan", help="checkpoints (default: %(default)s)")
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="those to run; the others' checkpoints are read")
    add("--minutes", type=float, help="wall-clock minutes after which each training of this run ends (default: none)")
    add("--autoencoder_steps", type=int, default=6000, help="batches (default: %(default)s)")
    add("--transformer_steps", type=int, default=20000, help="batches (default: %(default)s)")
    add("--clips", type=int, default=5600, help="composed for the transformer's training (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="clips a batch of the transformer (default: %(default)s)")
    add("--ema", type=float, default=0.998, help="decay of the transformer's averaged weights (default: %(default)s)")
    add_judging_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args()
    if not args.data.is_file():
        parser.error(f"--data: no file {args.data}")
    if not (args.parts / INDEX).is_file():
        parser.error(f"--parts {args.parts}: expected a tiny-flux ({INDEX}); name one")
    args.autocast = autocast(args.precision)
    return args


def main() -> None:
    args = parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    sprites = load_sprites(args.data)
    args.plan = partial(plan_stage, args)
    vae = train_autoencoder(args, sprites)
    if {"transformer", "export"} & set(args.stages):
        text = Text.load(args.parts)
        transformer = train_transformer(args, vae, sprites, text)
    if "export" in args.stages:
        export(args, vae, text, transformer, sprites)
    if "judge" in args.stages:
        judge(args, vae.float(), sprites)


if __name__ == "__main__":
    main()
