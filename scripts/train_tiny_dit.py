"""Train ``tiny-dit`` or ``tiny-dit-l``, the small class-conditional diffusion transformers that ship with xfuser.

Stages, each resumable: ``classifier`` (the feature network that judges images), ``autoencoder`` (an AutoencoderKL
with smooth, normalised latents), ``transformer`` (velocity prediction, see below), ``export`` (a complete
diffusers.DiTPipeline folder in half precision, and the reference statistics for FID and KID) and ``judge`` (does the
classifier recognise the class that was asked for?).

    python scripts/train_tiny_dit.py --data fashion_mnist.npz
    python scripts/train_tiny_dit.py --data fashion_mnist.npz --model tiny-dit-l

``tiny-dit-l``, of twice the depth, takes classifier and autoencoder from ``tiny-dit`` (``--parts``) and begins with the
transformer; its folder links to them where the two lie side by side.

The transformer predicts v = alpha * noise - sigma * x (Salimans and Ho, arXiv 2202.00512) at logit-normal times
(Esser et al., arXiv 2403.03206), with labels dropped outside of the model, because each block of
DiTTransformer2DModel embeds the labels for itself and would drop them block by block.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from torch import nn
from training import (
    Plan,
    Training,
    add_run_arguments,
    add_start_argument,
    begin,
    finish_export,
    normalise_latents,
    settled,
    started,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.metrics.features import FeatureNetwork  # noqa: E402
from xfuser.core.files import replacing, write_json  # noqa: E402
from xfuser.model_executor.pipelines import MODEL_TYPES, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.shipped import INDEX  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NULL_LABEL = 1000  # DiTPipeline writes this number into the unconditional half of the batch
STAGES = ("classifier", "autoencoder", "transformer", "export", "judge")
ASSETS = ROOT / "xfuser" / "assets"
WHOLE = "tiny-dit"  # has all parts of its own
CREDITS = """# tiny-dit-l

A `DiTPipeline` of 24 blocks, made by `scripts/train_tiny_dit.py --model tiny-dit-l`. It was trained on Fashion-MNIST
(MIT licence, Zalando SE); autoencoder, classifier and reference statistics are tiny-dit's.
"""


def load_images(path: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images padded to 32 x 32, uint8 [N, 1, 32, 32], and labels [N]."""
    with np.load(path) as archive:
        images = torch.from_numpy(archive[f"{split}_images"])
        labels = torch.from_numpy(archive[f"{split}_labels"]).long()
    return F.pad(images[:, None], (2, 2, 2, 2)), labels


def unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255


def train_classifier(args: argparse.Namespace) -> FeatureNetwork:
    if args.classifier:
        return FeatureNetwork.load(args.classifier)
    if args.parts:
        return FeatureNetwork.load(args.parts / "evaluation" / "classifier.safetensors")
    images, labels = load_images(args.data, "train")
    training = Training("classifier", FeatureNetwork(), args.plan(args.classifier_steps, 2e-3, 0.995))

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        batch = F.pad(unit(images[indices]), (2, 2, 2, 2))
        top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
        batch = batch[..., top : top + 32, left : left + 32]
        return F.cross_entropy(training.module.classify(batch), labels[indices], label_smoothing=0.05)

    training.run(loss_at, len(images))
    return training.averaged()


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
    )


def train_autoencoder(args: argparse.Namespace, judge: FeatureNetwork) -> AutoencoderKL:
    if args.parts:
        return AutoencoderKL.from_pretrained(args.parts / "vae").float().eval().requires_grad_(False)
    images, _ = load_images(args.data, "train")
    training = Training("autoencoder", build_autoencoder(), args.plan(args.autoencoder_steps, 2e-3, 0.995))
    vae = training.module

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        target = unit(images[indices])
        with args.autocast():
            posterior = vae.encode(target * 2 - 1).latent_dist
        posterior = DiagonalGaussianDistribution(posterior.parameters.float())
        with args.autocast():
            decoded = vae.decode(posterior.sample(generator=generator)).sample.float() / 2 + 0.5
        with torch.no_grad():
            wanted, wanted_logits = judge.maps(target), judge.classify(target)
        seen, seen_logits = judge.maps(decoded), judge.classify(decoded)
        perceptual = sum(F.l1_loss(a, b) / b.abs().mean() for a, b in zip(seen, wanted, strict=True))
        # The last layer counts too: without it shirts, coats and pullovers came back as one another.
        changed = F.kl_div(
            seen_logits.log_softmax(1), wanted_logits.log_softmax(1), log_target=True, reduction="batchmean"
        )
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return 2 * F.l1_loss(decoded, target) + 0.05 * perceptual + 0.1 * changed + 2e-3 * divergence

    training.run(loss_at, len(images))
    vae = training.averaged()
    normalise_latents(vae, encode_images(vae, images[::7]))
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    batches = [vae.encode(unit(batch) * 2 - 1).latent_dist.mode() for batch in images.split(256)]
    return torch.cat(batches)


@torch.no_grad()
def recognise(judge: FeatureNetwork, vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """The class that the classifier reads in each decoded latent, shape [N]."""
    decoded = (vae.decode(batch).sample / 2 + 0.5 for batch in latents.split(256))
    return torch.cat([judge.classify(images.clamp(0, 1)).argmax(1) for images in decoded])


def report_reconstructions(args: argparse.Namespace, judge: FeatureNetwork, vae: AutoencoderKL) -> None:
    images, labels = load_images(args.data, "test")
    correct = (recognise(judge, vae, encode_images(vae, images)) == labels).float()
    by_class = {name: round(correct[labels == i].mean().item(), 3) for i, name in enumerate(CLASS_NAMES)}
    print(f"autoencoder  test images recognised after reconstruction: {correct.mean():.4f}; {by_class}")


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def build_transformer(model: str) -> DiTTransformer2DModel:
    transformer = DiTTransformer2DModel(
        in_channels=4, out_channels=4, num_embeds_ada_norm=NULL_LABEL, **MODEL_TYPES[model].configuration
    )
    for block in transformer.transformer_blocks:
        # The fused attention's backward pass takes four times as long in bfloat16 on a CPU.
        block.attn1.set_processor(AttnProcessor())
    # Each block starts as the identity and the output as zero (DiT, arXiv 2212.09748, section 3.2).
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # Evaluation mode switches off nothing but the label dropout inside the blocks.
    return transformer.eval()


def train_transformer(args: argparse.Namespace, judge: FeatureNetwork, vae: AutoencoderKL) -> DiTTransformer2DModel:
    transformer = started(args, "transformer", build_transformer(args.model))
    training = Training("transformer", transformer, args.plan(args.transformer_steps, 1e-3, 0.998))
    if training.step >= args.transformer_steps:
        return training.averaged()
    images, labels = load_images(args.data, "train")
    latents = encode_images(vae, images)
    recognised = recognise(judge, vae, latents) == labels
    print(f"transformer  leaves out {int((~recognised).sum())} of {len(labels)} images that the classifier misreads")
    latents, labels = latents[recognised], labels[recognised]
    scheduler = build_scheduler()
    times = scheduler.config.num_train_timesteps

    def loss_at(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        clean = latents[indices]
        noise = torch.randn(clean.shape, generator=generator)
        uniform = torch.randn(len(indices), generator=generator).sigmoid()
        timestep = (uniform * times).long().clamp(0, times - 1)
        dropped = torch.rand(len(indices), generator=generator) < 0.1
        label = labels[indices].masked_fill(dropped, NULL_LABEL)
        noisy = scheduler.add_noise(clean, noise, timestep)
        target = scheduler.get_velocity(clean, noise, timestep)
        with args.autocast():
            predicted = training.module(noisy, timestep, label).sample
        return F.mse_loss(predicted.float(), target)

    training.run(loss_at, len(latents))
    return training.averaged()


def export(args: argparse.Namespace, judge: FeatureNetwork, vae: AutoencoderKL, dit: DiTTransformer2DModel) -> None:
    from evaluation.metrics.reference import write_reference

    pipeline = DiTPipeline(transformer=dit.half(), vae=vae.half(), scheduler=build_scheduler())
    pipeline.save_pretrained(args.output, safe_serialization=True)
    index = args.output / "model_index.json"
    described = json.loads(index.read_text()) | {"id2label": {str(i): name for i, name in enumerate(CLASS_NAMES)}}
    write_json(index, described)
    if args.parts:
        finish_export(args.output, CREDITS, args.parts, {"vae": "vae"})
        return
    folder = args.output / "evaluation"
    folder.mkdir(exist_ok=True)
    weights = {key: value.half() if value.is_floating_point() else value for key, value in judge.state_dict().items()}
    with replacing(folder / "classifier.safetensors") as temporary:
        save_file(weights, temporary)
    network = FeatureNetwork.load(folder / "classifier.safetensors")
    images, labels = load_images(args.data, "test")
    predicted = torch.cat([network.classify(unit(batch)).argmax(1) for batch in images.split(512)])
    accuracy = (predicted == labels).float().mean().item()
    features = torch.cat([network(unit(batch)) for batch in images.split(512)])
    write_reference(folder / "reference.safetensors", features, {"test_accuracy": f"{accuracy:.4f}"})
    print(f"exported to {args.output}; the classifier's test accuracy is {accuracy:.4f}")


def judge_samples(args: argparse.Namespace) -> None:
    """Generate --judged images with the exported pipeline: class accuracy, FID and a grid, one class a column."""
    from evaluation.metrics import frechet_distance, gaussian, read_reference

    pipeline = load_pipeline(args.model, str(args.output)).pipeline
    pipeline.set_progress_bar_config(disable=True)
    evaluation = (args.parts or args.output) / "evaluation"
    network = FeatureNetwork.load(evaluation / "classifier.safetensors")
    batches = []
    for start in track(range(0, args.judged, 20), description="judge       "):
        generators = [torch.Generator().manual_seed(start + index) for index in range(20)]
        labels = [index % len(CLASS_NAMES) for index in range(20)]
        images = pipeline(labels, 1.5, generators, num_inference_steps=50, output_type="np").images
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    images = torch.cat(batches)
    wanted = torch.arange(len(images)) % len(CLASS_NAMES)
    accuracy = (network.classify(images).argmax(1) == wanted).float()
    reference = read_reference(evaluation / "reference.safetensors")
    distance = frechet_distance(*gaussian(network(images).numpy()), reference.mean, reference.covariance)
    by_class = {name: round(accuracy[wanted == i].mean().item(), 3) for i, name in enumerate(CLASS_NAMES)}
    print(f"{len(images)} images: class accuracy {accuracy.mean():.4f}, FID {distance:.2f}; {by_class}")
    rows = [torch.cat(list(row[:, 0]), dim=1) for row in images[:80].split(len(CLASS_NAMES))]
    grid = Image.fromarray((torch.cat(rows) * 255).round().byte().numpy())
    grid = grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.LANCZOS)
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.grid) as temporary:
        grid.save(temporary, format="PNG")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="fashion_mnist.npz (train_images, train_labels, …)")
    add("--model", choices=(WHOLE, "tiny-dit-l"), default=WHOLE, help="default: %(default)s")
    add("--output", type=Path, help="the pipeline folder (default: the model's in xfuser/assets)")
    add("--workdir", type=Path, help="checkpoints (default: runs/MODEL)")
    add("--until", choices=STAGES, default="judge", help="the last stage to run (default: %(default)s)")
    add(
        "--parts",
        type=Path,
        help="a tiny-dit, whose classifier and autoencoder tiny-dit-l takes (default: the one in the package)",
    )
    add("--classifier", type=Path, help="weights of a trained classifier, in place of training one")
    add_start_argument(parser)
    add("--classifier_steps", type=int, default=3000, help="batches (default: %(default)s)")
    add("--autoencoder_steps", type=int, default=3000, help="batches (default: %(default)s)")
    add("--transformer_steps", type=int, default=4000, help="batches (default: %(default)s)")
    add("--minutes", type=float, help="wall-clock minutes after which each stage of this run ends (default: no limit)")
    add("--judged", type=int, default=500, help="images to judge (default: %(default)s)")
    add("--grid", type=Path, help="picture of some of them (default: docs/images/MODEL_samples.png)")
    add("--batch_size", type=int, default=64, help="images a batch (default: %(default)s)")
    add_run_arguments(parser)
    args = settled(parser)
    args.output = args.output or ASSETS / args.model
    args.workdir = args.workdir or Path("runs") / args.model
    args.grid = args.grid or ROOT / "docs" / "images" / f"{args.model.replace('-', '_')}_samples.png"
    if args.model == WHOLE and args.parts:
        parser.error(f"--parts: {WHOLE} has all parts of its own; leave it out, or choose --model tiny-dit-l")
    if args.model != WHOLE:
        args.parts = args.parts or ASSETS / WHOLE
    if args.classifier and not args.classifier.is_file():
        parser.error(f"--classifier: no file {args.classifier}")
    if args.parts and not (args.parts / INDEX).is_file():
        parser.error(f"--parts {args.parts}: expected a tiny-dit ({INDEX}); name one")
    kept = {"seed": args.seed, "checkpoint_every": args.checkpoint_every, "batch_size": args.batch_size}
    args.plan = partial(Plan, args.workdir, minutes=args.minutes, **kept)
    return args


def main() -> None:
    args = parse_args()
    begin(args)
    last = STAGES.index(args.until)
    judge = train_classifier(args)
    if last >= 1:
        vae = train_autoencoder(args, judge)
        if not args.parts:
            report_reconstructions(args, judge, vae)
    if last >= 2:
        dit = train_transformer(args, judge, vae)
    if last >= 3:
        export(args, judge, vae, dit)
    if last >= 4:
        judge_samples(args)


if __name__ == "__main__":
    main()
