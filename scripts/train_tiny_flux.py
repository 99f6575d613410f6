"""Train ``tiny-flux``, the small text-to-image FLUX that draws captioned emoji.

Stages, each resumable and chosen with --stages (all by default):

- ``autoencoder``: an AutoencoderKL of 64 x 64 images with 4 channels at 16 x 16; FLUX packs them into 64 tokens.
- ``text``: a CLIP and a T5 encoder with their tokenizers, trained to foretell the thumbnails of what phrases describe.
  They are frozen from there on.
- ``matcher``: the image-text matcher, from a public network's features (an extra: ``evaluation``).
- ``coarse``: the transformer on latents of half the size (16 tokens), which cost a third and teach it what to draw.
- ``transformer``: the transformer, from there, on all 64 tokens.
- ``guide``: the transformer, from there, learns to foretell its own guided velocity for any guidance_scale in [1, 4]
  (as FLUX.1-dev; Meng et al., arXiv 2210.03142), so that one evaluation a step draws what guidance needs two for.
- ``export``: a complete diffusers.FluxPipeline folder in half precision. ``judge``: the matcher's bars and a grid.

    python scripts/train_tiny_flux.py --data emoji64.npz --output xfuser/assets/tiny-flux

The transformer predicts noise - x at logit-normal times (rectified flow; Esser et al., arXiv 2403.03206). A tenth of
the phrases are dropped.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from tiny_flux_parts import (
    SIZE,
    Emoji,
    Phrases,
    TextEncoders,
    build_autoencoder,
    build_transformer,
    load_emoji,
)
from training import (
    Training,
    add_run_arguments,
    add_stage_arguments,
    begin,
    checkpoint,
    finish_export,
    normalise_latents,
    plan_stage,
    settled,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_flux_text import report_matcher, train_matcher, train_text, unit  # noqa: E402
from tiny_judging import add_judging_arguments, judge  # noqa: E402

from evaluation.metrics.matcher import ImageTextMatcher  # noqa: E402
from xfuser.core.files import replacing  # noqa: E402
from xfuser.model_executor.pipelines.shipped import INDEX  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CREDITS = """# tiny-flux

A small `FluxPipeline`, made by `scripts/train_tiny_flux.py`. It was trained on emoji in the styles of Noto Emoji
(Apache-2.0) and of Twemoji (CC-BY 4.0, Twitter, Inc and other contributors), described by their Unicode names.
"""
FLOWS = ("coarse", "transformer", "guide")
STAGES = ("autoencoder", "text", "matcher", *FLOWS, "export", "judge")


def train_autoencoder(args: argparse.Namespace, emoji: Emoji) -> AutoencoderKL:
    """Train the autoencoder on images and on quarters of them, then make its latents standard."""
    plan = args.plan("autoencoder", steps=args.autoencoder_steps, learning_rate=2e-3, ema=0.99, batch_size=32)
    training = Training("autoencoder", build_autoencoder(), plan)
    vae = training.module
    usable = emoji.trained_on

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen = usable[indices]
        # Whole images a third of the time: the normalisation over a quarter differs from that over an image.
        if torch.rand((), generator=generator) < 1 / 3:
            target = unit(emoji.images[chosen[: len(chosen) // 4]])
        else:
            top, left = torch.randint(0, SIZE // 2 + 1, (2,), generator=generator).tolist()
            target = unit(emoji.images[chosen, :, top : top + SIZE // 2, left : left + SIZE // 2])
        target = target * 2 - 1
        with args.autocast():
            posterior = vae.encode(target).latent_dist
        posterior = DiagonalGaussianDistribution(posterior.parameters.float())
        with args.autocast():
            decoded = vae.decode(posterior.sample(generator=generator)).sample.float()
        edges = sum(F.l1_loss(decoded.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
        # Rare colours come back grey unless the hue counts for itself.
        hue, wanted = (F.avg_pool2d(each - each.mean(dim=1, keepdim=True), 4) for each in (decoded, target))
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, target) + edges + 4 * F.l1_loss(hue, wanted) + 1e-3 * divergence

    training.run(loss_at, len(usable))
    training.averaged()
    normalise_latents(vae, encode_images(vae, emoji.images[usable[::7]]))
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents [N, 4, 16, 16] of images uint8 [N, 3, 64, 64]."""
    return torch.cat([vae.encode(unit(batch) * 2 - 1).latent_dist.mode() for batch in images.split(64)])


def cached_latents(args: argparse.Namespace, vae: AutoencoderKL, emoji: Emoji) -> torch.Tensor:
    """The latents of all images, kept beside the autoencoder's checkpoint for as long as that is not trained on."""
    path, made_by = args.workdir / "latents.safetensors", args.workdir / "autoencoder.safetensors"
    if not path.exists() or path.stat().st_mtime < made_by.stat().st_mtime:
        latents = encode_images(vae, emoji.images)
        with replacing(path) as temporary:
            save_file({"latents": latents}, temporary)
    return load_file(path)["latents"]


def foretell(
    transformer: FluxTransformer2DModel,
    noisy: torch.Tensor,
    time: torch.Tensor,
    guidance: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Call a transformer as FluxPipeline does, on latents [N, 4, H, W]; the velocity, of their shape."""
    count, channels, height, width = noisy.shape
    places = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32)
    # Coarse latents lie where the four tokens that they stand for lie.
    spread = SIZE // 4 // height
    places[:, 1:] = places[:, 1:] * spread + (spread - 1) / 2
    pooled, states = text
    # Single precision is as fast as autocast to bfloat16 on a CPU at this width.
    velocity = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
        timestep=time,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3),
        img_ids=places,
        return_dict=False,
    )[0]
    # In pixels of the image, of which four make a latent's.
    return FluxPipeline._unpack_latents(velocity, 4 * height, 4 * width, 4)


def train_flow(
    args: argparse.Namespace,
    stage: str,
    transformer: FluxTransformer2DModel,
    latents: torch.Tensor,
    text: TextEncoders,
    emoji: Emoji,
) -> FluxTransformer2DModel:
    """Train the stage ``coarse``, ``transformer`` or ``guide`` from the transformer that the one before it left."""
    teacher = copy.deepcopy(transformer).eval().requires_grad_(False) if stage == "guide" else None
    steps, rate = {
        "coarse": (args.coarse_steps, 1.5e-3),
        "transformer": (args.transformer_steps, 1e-3),
        "guide": (args.guide_steps, 3e-4),
    }[stage]
    plan = args.plan(stage, steps=steps, learning_rate=rate, ema=args.ema, batch_size=args.batch_size)
    training = Training(stage, transformer.train().requires_grad_(True), plan)
    if stage == "coarse":
        latents = F.avg_pool2d(latents, 2)
        latents = latents / latents.std()
    phrases, usable = Phrases(emoji), emoji.trained_on
    nothing = text.encode([""])

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen, count = usable[indices], len(indices)
        said = phrases(chosen, generator)
        if teacher is None:
            dropped = torch.rand(count, generator=generator) < 0.1
            said = ["" if drop else each for each, drop in zip(said, dropped.tolist(), strict=True)]
        with torch.no_grad():
            told = text.encode(said)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        time = torch.randn(count, generator=generator).sigmoid()
        noisy = torch.lerp(clean, noise, time[:, None, None, None])
        guidance = torch.ones(count)
        target = noise - clean
        if teacher is not None:
            empty = tuple(each.expand(count, *each.shape[1:]) for each in nothing)
            with torch.no_grad():
                with_text, without = (foretell(teacher, noisy, time, guidance, each) for each in (told, empty))
            guidance = 1 + 3 * torch.rand(count, generator=generator)
            target = without + guidance[:, None, None, None] * (with_text - without)
        return F.mse_loss(foretell(training.module, noisy, time, guidance, told), target)

    training.run(loss_at, len(usable))
    return training.averaged()


def export(
    args: argparse.Namespace, vae: AutoencoderKL, text: TextEncoders, transformer: FluxTransformer2DModel
) -> None:
    """Write the pipeline in half precision."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.half(),
        text_encoder=text.clip.half(),
        tokenizer=text.tokenizers[0],
        text_encoder_2=text.t5.half(),
        tokenizer_2=text.tokenizers[1],
        transformer=transformer.half(),
    )
    pipeline.save_pretrained(args.output, safe_serialization=True)
    finish_export(args.output, CREDITS)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument)
    add_stage_arguments(parser, "tiny-flux", STAGES)
    add("--autoencoder_steps", type=int, default=6000, help="batches (default: %(default)s)")
    add("--text_steps", type=int, default=3000, help="batches (default: %(default)s)")
    add("--coarse_steps", type=int, default=15000, help="batches (default: %(default)s)")
    add("--transformer_steps", type=int, default=20000, help="batches (default: %(default)s)")
    add("--guide_steps", type=int, default=1500, help="batches (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="images a batch of the transformer (default: %(default)s)")
    add("--ema", type=float, default=0.998, help="decay of the transformer's averaged weights (default: %(default)s)")
    add_judging_arguments(parser, 28, 2.0, ROOT / "docs" / "images" / "tiny_flux_samples.png")
    add_run_arguments(parser)
    return settled(parser)


def main() -> None:
    args = parse_args()
    begin(args)
    emoji = load_emoji(args.data)
    args.plan = partial(plan_stage, args)
    if {"matcher", "export"} & set(args.stages):
        matcher = train_matcher(args, emoji)
        report_matcher(emoji, matcher)
    if {"autoencoder", "text", *FLOWS, "export"} & set(args.stages):
        vae = train_autoencoder(args, emoji)
        text = train_text(args, emoji)
        flows = [stage for stage in FLOWS if stage in args.stages or checkpoint(args, stage).exists()]
        transformer = build_transformer()
        if flows:
            latents = cached_latents(args, vae, emoji)
        for stage in flows:
            transformer = train_flow(args, stage, transformer, latents, text, emoji)
    if "export" in args.stages:
        export(args, vae, text, transformer)
    if {"matcher", "export"} & set(args.stages) and (args.output / INDEX).is_file():
        (args.output / "evaluation").mkdir(exist_ok=True)
        with replacing(args.output / "evaluation" / "matcher.safetensors") as temporary:
            matcher.save(temporary)
    if "judge" in args.stages:
        judge("tiny-flux", args, emoji, ImageTextMatcher.load(args.output / "evaluation" / "matcher.safetensors"))


if __name__ == "__main__":
    main()
