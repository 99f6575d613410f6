"""Train ``tiny-sd``, a small Stable Diffusion that draws captioned emoji with tiny-flux's autoencoder and CLIP.

Stages, each chosen with --stages (all by default):

- ``coarse``: a UNet2DConditionModel with transformer blocks of 64 and of 128 channels, which foretells the noise, on
  latents of half the size, which cost a quarter and teach it what to draw. A tenth of the phrases are dropped
  (classifier-free guidance, arXiv 2207.12598).
- ``unet``: the same UNet, from there, on whole latents. Both resume from their checkpoints.
- ``export``: a diffusers.StableDiffusionPipeline folder in half precision. Autoencoder and text encoder are linked
  (shared.json) where --parts is a model beside it, and written again where not.
- ``judge``: the matcher's bar and a grid.

    python scripts/train_tiny_sd.py --data emoji64.npz --output xfuser/assets/tiny-sd

--parts may also be the working folder of scripts/train_tiny_flux.py, once its stages ``autoencoder`` and ``text`` are
done.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_flux_parts import CLIP_HIDDEN, LATENT_CHANNELS, SIZE, Emoji, load_emoji
from tiny_text_to_image import COARSE, add_denoiser_arguments, encoded, settle_matcher, train_denoiser
from train_tiny_flux import train_autoencoder
from training import (
    add_run_arguments,
    add_stage_arguments,
    add_start_argument,
    begin,
    checkpoint,
    finish_export,
    plan_stage,
    settled,
    started,
)
from transformers import CLIPTextModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_flux_text import train_text  # noqa: E402
from tiny_judging import add_judging_arguments, judge  # noqa: E402

from evaluation.metrics.matcher import ImageTextMatcher  # noqa: E402
from xfuser.model_executor.pipelines.shipped import INDEX, shipped_types  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
UNETS = (COARSE, "unet")
STAGES = (*UNETS, "export", "judge")
CHANNELS = (64, 128)
LINKED = {part: part for part in ("vae", "text_encoder", "tokenizer")}
CREDITS = """# tiny-sd

A small `StableDiffusionPipeline`, made by `scripts/train_tiny_sd.py`. It was trained on emoji in the styles of Noto
Emoji (Apache-2.0) and of Twemoji (CC-BY 4.0, Twitter, Inc and other contributors), described by their Unicode names.
"""


@dataclass(frozen=True)
class Parts:
    """What tiny-sd takes from tiny-flux, in single precision and not trained any more."""

    vae: AutoencoderKL
    clip: CLIPTextModel
    tokenizer: PreTrainedTokenizerFast

    @torch.no_grad()
    def encode(self, phrases: list[str]) -> torch.Tensor:
        """CLIP's states [N, 20, 128], as StableDiffusionPipeline computes them."""
        ids = self.tokenizer(phrases, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.clip(ids).last_hidden_state


def is_model(folder: Path) -> bool:
    """Whether a folder is a tiny-flux, rather than the working folder in which one is trained."""
    return (folder / INDEX).is_file()


def load_parts(args: argparse.Namespace, emoji: Emoji) -> Parts:
    """Read the autoencoder, the text encoder and its tokenizer from a tiny-flux or from its checkpoints."""
    if is_model(args.parts):
        vae = AutoencoderKL.from_pretrained(args.parts / "vae").float()
        clip = CLIPTextModel.from_pretrained(args.parts / "text_encoder").float()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.parts / "tokenizer")
    else:
        trained = argparse.Namespace(
            **(vars(args) | {"workdir": args.parts, "stages": (), "minutes": None, "start": None})
        )
        trained.autoencoder_steps = trained.text_steps = 0
        trained.plan = partial(plan_stage, trained)
        vae, text = train_autoencoder(trained, emoji), train_text(trained, emoji)
        clip, tokenizer = text.clip, text.tokenizers[0]
    return Parts(vae.eval().requires_grad_(False), clip.eval().requires_grad_(False), tokenizer)


def build_unet() -> UNet2DConditionModel:
    """Seven transformer blocks of 4 heads, on 256 places of 64 channels and on 64 places of 128; 4.2 M parameters."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=CLIP_HIDDEN,
        attention_head_dim=4,
    )
    # The fused attention's backward pass takes four times as long in bfloat16 on a CPU.
    unet.set_attn_processor(AttnProcessor())
    return unet


def build_scheduler() -> DDIMScheduler:
    """A thousand steps of linear variance, as DiT's, of which DDIM takes some, from the noisiest on."""
    return DDIMScheduler(timestep_spacing="trailing", clip_sample=False, steps_offset=1)


def export(args: argparse.Namespace, parts: Parts, unet: UNet2DConditionModel) -> None:
    """Write the pipeline in half precision; what lies in a model beside it is linked."""
    pipeline = StableDiffusionPipeline(
        vae=parts.vae.half(),
        text_encoder=parts.clip.half(),
        tokenizer=parts.tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(args.output, safe_serialization=True)
    finish_export(args.output, CREDITS, args.parts, LINKED)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument)
    add_stage_arguments(parser, "tiny-sd", STAGES)
    add_start_argument(parser)
    add(
        "--parts",
        type=Path,
        default=shipped_types()["tiny-flux"],
        help="a tiny-flux, or the working folder of its training (default: the one in the package)",
    )
    add("--coarse_steps", type=int, default=8000, help="batches (default: %(default)s)")
    add("--unet_steps", type=int, default=15000, help="batches (default: %(default)s)")
    add_denoiser_arguments(parser)
    add_judging_arguments(parser, 50, 3.0, ROOT / "docs" / "images" / "tiny_sd_samples.png")
    add_run_arguments(parser)
    args = settled(parser)
    if not is_model(args.parts) and not all(has_checkpoint(args.parts, stage) for stage in ("autoencoder", "text")):
        parser.error(
            f"--parts {args.parts}: expected a tiny-flux ({INDEX}), or the working folder of its training "
            "(autoencoder.safetensors and text.safetensors); name one"
        )
    settle_matcher(parser, args)
    return args


def has_checkpoint(workdir: Path, stage: str) -> bool:
    """Whether a stage of tiny-flux's training has a checkpoint there."""
    return checkpoint(argparse.Namespace(workdir=workdir), stage).is_file()


def main() -> None:
    args = parse_args()
    begin(args)
    emoji = load_emoji(args.data)
    args.plan = partial(plan_stage, args)
    if {*UNETS, "export"} & set(args.stages):
        parts, unet = load_parts(args, emoji), started(args, "unet", build_unet())
        latents = encoded(args, parts.vae, emoji)
        steps = {COARSE: args.coarse_steps, "unet": args.unet_steps}

        def foretell(noisy: torch.Tensor, times: torch.Tensor, said: list[str]) -> torch.Tensor:
            return unet(noisy, times, parts.encode(said)).sample

        train_denoiser(args, steps, unet, build_scheduler(), latents, emoji, foretell)
    if "export" in args.stages:
        export(args, parts, unet)
    if "judge" in args.stages:
        judge("tiny-sd", args, emoji, ImageTextMatcher.load(args.matcher))


if __name__ == "__main__":
    main()
