"""Train ``tiny-sgdiff``, SGDiff (arXiv 2211.11138) in small: scene graphs to images, on scenes composed of emoji.

Stages, each resumable and chosen with --stages (all by default):

- ``autoencoder``: tiny-flux's autoencoder, trained on with scenes, whose objects are too small for it as it is.
- ``encoder``: the graph encoder, pretrained to fill in masked regions of latents (masked autoencoding) and to tell an
  image's own graph from others (contrastive). It is frozen from there on, unless told otherwise.
- ``unet``: a UNet2DConditionModel that foretells velocities and reads the encoder's tokens. A tenth of the graphs are
  dropped (classifier-free guidance, arXiv 2207.12598). With ``--train_encoder`` the encoder learns with it.
- ``decoder``: the autoencoder's second half alone, on whole latents, for as long as there is time: half of its scenes
  have an object inside another, which is what is blurred most.
- ``export``: a complete SceneGraphPipeline folder in half precision. ``judge``: relations shown, and a grid.

    python scripts/train_tiny_sgdiff.py --data emoji64.npz --output xfuser/assets/tiny-sgdiff
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from training import (
    Training,
    add_run_arguments,
    add_stage_arguments,
    add_start_argument,
    begin,
    checkpoint,
    finish_export,
    noised,
    normalise_latents,
    plan_stage,
    settled,
    started,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_flux_text import unit  # noqa: E402
from tiny_judging import add_judging_arguments  # noqa: E402
from tiny_scenes import Composer, cut_sprites  # noqa: E402
from tiny_sgdiff_judging import judge  # noqa: E402
from tiny_sgdiff_parts import (  # noqa: E402
    Pretraining,
    Scenes,
    build_encoder,
    build_scheduler,
    build_unet,
    cached_latents,
    cached_scenes,
)

from evaluation.metrics.relations import Sprites  # noqa: E402
from xfuser.core.files import replacing, write_text  # noqa: E402
from xfuser.model_executor.pipelines.scene_graph import SceneGraphPipeline  # noqa: E402
from xfuser.model_executor.pipelines.scene_graph_encoder import SceneGraphEncoder  # noqa: E402
from xfuser.model_executor.pipelines.shipped import shipped_types  # noqa: E402

GRAPHS = 256  # held out, that come with the model
ROOT = Path(__file__).resolve().parent.parent
STAGES = ("autoencoder", "encoder", "unet", "decoder", "export", "judge")
CREDITS = """# tiny-sgdiff

A small `SceneGraphPipeline` after SGDiff (arXiv 2211.11138), made by `scripts/train_tiny_sgdiff.py`. It was trained on
scenes that the script composes of emoji of Noto Emoji (Copyright Google, Apache-2.0); its autoencoder is tiny-flux's,
trained on, which saw Twemoji (CC-BY 4.0, Twitter, Inc and other contributors) too. `evaluation/objects.png`
holds the emoji that scenes are composed of.
"""


def train_autoencoder(args: argparse.Namespace, scenes: Scenes) -> AutoencoderKL:
    """Train tiny-flux's autoencoder on with scenes, then make its latents standard."""
    plan = args.plan("autoencoder", steps=args.autoencoder_steps, learning_rate=1e-3, ema=0.99, batch_size=16)
    vae = started(args, "vae", AutoencoderKL.from_pretrained(args.parts / "vae").float())
    vae.register_to_config(_name_or_path=args.parts.name)  # the folder's whole path would be exported
    training = Training("autoencoder", vae, plan)

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        target = unit(scenes.images[indices]) * 2 - 1
        with args.autocast():
            posterior = vae.encode(target).latent_dist
        posterior = DiagonalGaussianDistribution(posterior.parameters.float())
        with args.autocast():
            decoded = vae.decode(posterior.sample(generator=generator)).sample.float()
        edges = sum(F.l1_loss(decoded.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, target) + edges + 1e-3 * divergence

    training.run(loss_at, len(scenes.images))
    training.averaged()
    with torch.no_grad():
        sample = unit(scenes.images[:: max(1, len(scenes.images) // 512)])
        normalise_latents(vae, torch.cat([vae.encode(batch * 2 - 1).latent_dist.mode() for batch in sample.split(64)]))
    return vae


def train_encoder(args: argparse.Namespace, latents: torch.Tensor, scenes: Scenes) -> SceneGraphEncoder:
    """Pretrain the graph encoder, masked and contrastively."""
    plan = args.plan("encoder", steps=args.encoder_steps, learning_rate=2e-3, ema=0.995, batch_size=64)
    training = Training("encoder", Pretraining(started(args, "graph_encoder", build_encoder())), plan)
    numbers = training.module.encoder.numbers_of(scenes.graphs)

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with args.autocast():
            masked, contrastive = training.module.losses(latents[indices], numbers[indices], generator)
        return masked.float() + args.contrastive * contrastive.float()

    training.run(loss_at, len(numbers))
    return training.averaged().encoder


def train_unet(
    args: argparse.Namespace, latents: torch.Tensor, scenes: Scenes, encoder: SceneGraphEncoder
) -> tuple[UNet2DConditionModel, SceneGraphEncoder]:
    """Train the UNet to foretell velocities, from graphs of which a tenth are dropped; the encoder with it if asked."""
    plan = args.plan("unet", steps=args.unet_steps, learning_rate=args.rate, ema=args.ema, batch_size=args.batch_size)
    unet = started(args, "unet", build_unet())
    # The fused attention's backward pass takes four times as long in bfloat16 on a CPU.
    unet.set_attn_processor(AttnProcessor())
    both = nn.ModuleDict({"unet": unet, "encoder": encoder.train().requires_grad_(args.train_encoder)})
    training = Training("unet", both, plan)
    scheduler = build_scheduler()
    numbers = encoder.numbers_of(scenes.graphs)

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        dropped = torch.rand(len(indices), generator=generator) < 0.1
        told = encoder(numbers[indices]) * ~dropped[:, None, None]
        noisy, times, target = noised(scheduler, latents[indices], generator)
        with args.autocast():
            foretold = unet(noisy, times, told).sample
        return F.mse_loss(foretold.float(), target)

    training.run(loss_at, len(latents))
    training.averaged()
    return unet, encoder


def train_decoder(args: argparse.Namespace, vae: AutoencoderKL, latents: torch.Tensor, scenes: Scenes) -> None:
    """Train the autoencoder's second half alone, which leaves the latents as the UNet knows them."""
    plan = args.plan("decoder", steps=args.decoder_steps, learning_rate=1e-3, ema=0.99, batch_size=16)
    halves = nn.ModuleList([vae.post_quant_conv, vae.decoder]).train().requires_grad_(True)
    training = Training("decoder", halves, plan)
    within = [index for index, graph in enumerate(scenes.graphs) if any(r[1] == "inside" for r in graph["relations"])]
    nested = torch.tensor(within or range(len(scenes.graphs)))

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        half = len(indices) // 2
        chosen = torch.cat([indices[:half], nested[indices[half:] % len(nested)]])
        # What a UNet makes is not quite what the encoder does.
        sampled = latents[chosen] + 0.05 * torch.randn(latents[chosen].shape, generator=generator)
        target = unit(scenes.images[chosen]) * 2 - 1
        with args.autocast():
            decoded = vae.decode(sampled).sample.float()
        edges = sum(F.l1_loss(decoded.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
        # Absolute errors are least where what is not sure is left out; squared ones show it faintly.
        return F.l1_loss(decoded, target) + edges + 8 * F.mse_loss(decoded, target)

    training.run(loss_at, len(latents))
    training.averaged()


def export(
    args: argparse.Namespace,
    vae: AutoencoderKL,
    encoder: SceneGraphEncoder,
    unet: UNet2DConditionModel,
    sprites: Sprites,
) -> None:
    """Write the pipeline in half precision, and into its folder ``evaluation`` what it is judged by."""
    pipeline = SceneGraphPipeline(vae.half(), encoder.half(), unet.half(), build_scheduler())
    pipeline.save_pretrained(args.output, safe_serialization=True)
    (args.output / "evaluation").mkdir(exist_ok=True)
    with replacing(args.output / "evaluation" / "objects.png") as temporary:
        sprites.save(temporary)
    composer = Composer(sprites, held_out=True)
    graphs = [json.dumps(composer.compose(number).graph) for number in range(GRAPHS)]
    write_text(args.output / "evaluation" / "scene_graphs.json", "[\n" + ",\n".join(graphs) + "\n]\n")
    finish_export(args.output, CREDITS)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument)
    add_stage_arguments(parser, "tiny-sgdiff", STAGES)
    add_start_argument(parser)
    add(
        "--parts",
        type=Path,
        default=shipped_types()["tiny-flux"],
        help="a tiny-flux, whose autoencoder is trained on (default: the one in the package)",
    )
    add("--scenes", type=int, default=24000, help="composed to train on (default: %(default)s)")
    add("--autoencoder_steps", type=int, default=3000, help="batches (default: %(default)s)")
    add("--encoder_steps", type=int, default=4000, help="batches (default: %(default)s)")
    add("--contrastive", type=float, default=0.1, help="weight of the contrastive loss (default: %(default)s)")
    add("--unet_steps", type=int, default=20000, help="batches (default: %(default)s)")
    add("--train_encoder", action="store_true", help="train the graph encoder along with the UNet (default: frozen)")
    add("--rate", type=float, default=1e-3, help="learning rate of the UNet (default: %(default)s)")
    add("--decoder_steps", type=int, default=3000, help="batches (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="scenes a batch of the UNet (default: %(default)s)")
    add("--ema", type=float, default=0.998, help="decay of the UNet's averaged weights (default: %(default)s)")
    add_judging_arguments(parser, 50, 6.0, ROOT / "docs" / "images" / "tiny_sgdiff_samples.png", judged=256)
    add_run_arguments(parser)
    return settled(parser)


def main() -> None:
    args = parse_args()
    begin(args)
    args.plan = partial(plan_stage, args)
    sprites = cut_sprites(args.data)
    if set(args.stages) - {"judge"}:
        scenes = cached_scenes(args.workdir, Composer(sprites), args.scenes)
        vae = train_autoencoder(args, scenes)
    if {"encoder", "unet", "decoder", "export"} & set(args.stages):
        latents = cached_latents(args, vae, scenes.images)
        encoder = train_encoder(args, latents, scenes)
        if "decoder" in args.stages or checkpoint(args, "decoder").exists():
            train_decoder(args, vae, latents, scenes)
    if {"unet", "export"} & set(args.stages):
        unet, encoder = train_unet(args, latents, scenes, encoder)
    if "export" in args.stages:
        export(args, vae, encoder, unet, sprites)
    if "judge" in args.stages:
        judge(args, sprites)


if __name__ == "__main__":
    main()
