"""Train ``tiny-pixart``, a small PixArt that draws captioned emoji with tiny-flux's autoencoder and T5.

Stages, each chosen with --stages (all by default); trainings resume from their checkpoints:

- ``coarse``: a PixArtTransformer2DModel of 10 blocks, which foretells velocities, on latents of half the size (16
  tokens), which cost a third and teach it what to draw. A tenth of the phrases are dropped (classifier-free guidance,
  arXiv 2207.12598).
- ``transformer``: the same transformer, from there, on all 64 tokens.
- ``export``: a diffusers.PixArtAlphaPipeline folder in half precision. Autoencoder and text encoder are linked
  (shared.json) where --parts is a model beside it, and written again where not.
- ``judge``: the matcher's share and a grid.

    python scripts/train_tiny_pixart.py --data emoji64.npz --output xfuser/assets/tiny-pixart
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_flux_parts import T5_HIDDEN, T5_TOKENS, load_emoji
from tiny_text_to_image import COARSE, add_denoiser_arguments, encoded, settle_matcher, train_denoiser
from torch import nn
from training import (
    add_run_arguments,
    add_stage_arguments,
    add_start_argument,
    begin,
    finish_export,
    plan_stage,
    settled,
    started,
)
from transformers import PreTrainedTokenizerFast, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny_judging import add_judging_arguments, judge  # noqa: E402

from evaluation.metrics.matcher import ImageTextMatcher  # noqa: E402
from xfuser.model_executor.adapters.pixart import TINY  # noqa: E402
from xfuser.model_executor.pipelines.shipped import INDEX, shipped_types  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TRANSFORMERS = (COARSE, "transformer")
STAGES = (*TRANSFORMERS, "export", "judge")
LINKED = {"vae": "vae", "text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}
CREDITS = """# tiny-pixart

A small `PixArtAlphaPipeline`, made by `scripts/train_tiny_pixart.py`. It was trained on emoji in the styles of Noto
Emoji (Apache-2.0) and of Twemoji (CC-BY 4.0, Twitter, Inc and other contributors), described by their Unicode names.
"""


@dataclass(frozen=True)
class Parts:
    """What tiny-pixart takes from tiny-flux, in single precision and not trained any more."""

    vae: AutoencoderKL
    t5: T5EncoderModel
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, folder: Path) -> Parts:
        """Read them from a tiny-flux."""
        vae = AutoencoderKL.from_pretrained(folder / "vae").float()
        t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").float()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2")
        return cls(vae.eval().requires_grad_(False), t5.eval().requires_grad_(False), tokenizer)

    @torch.no_grad()
    def encode(self, phrases: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's states [N, 16, 96] and which of them are no padding [N, 16], as PixArtAlphaPipeline computes them."""
        told = self.tokenizer(phrases, padding="max_length", max_length=T5_TOKENS, truncation=True, return_tensors="pt")
        return self.t5(told.input_ids, told.attention_mask).last_hidden_state, told.attention_mask


def build_transformer() -> PixArtTransformer2DModel:
    """Ten blocks of 4 heads, 28 channels each, which begin as the identity (PixArt, section 2.3)."""
    transformer = PixArtTransformer2DModel(**TINY, caption_channels=T5_HIDDEN)
    # The fused attention's backward pass takes four times as long in bfloat16 on a CPU.
    transformer.set_attn_processor(AttnProcessor())
    zeroed = [transformer.adaln_single.linear, transformer.proj_out]
    zeroed += [block.attn2.to_out[0] for block in transformer.transformer_blocks]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.scale_shift_table)
    return transformer


def build_scheduler() -> DDIMScheduler:
    """A thousand steps of linear variance, as PixArt's, of which DDIM takes some, from the noisiest on.

    Velocities (arXiv 2202.00512) weigh the noisiest times more than noise does, which is where the layout is settled.
    """
    return DDIMScheduler(timestep_spacing="trailing", clip_sample=False, steps_offset=1, prediction_type="v_prediction")


def export(args: argparse.Namespace, parts: Parts, transformer: PixArtTransformer2DModel) -> None:
    """Write the pipeline in half precision; what lies in a model beside it is linked."""
    pipeline = PixArtAlphaPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.t5.half(),
        vae=parts.vae.half(),
        transformer=transformer.half(),
        scheduler=build_scheduler(),
    )
    pipeline.save_pretrained(args.output, safe_serialization=True)
    finish_export(args.output, CREDITS, args.parts, LINKED)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument)
    add_stage_arguments(parser, "tiny-pixart", STAGES)
    add_start_argument(parser)
    add(
        "--parts",
        type=Path,
        default=shipped_types()["tiny-flux"],
        help="a tiny-flux, whose autoencoder and T5 are taken (default: the one in the package)",
    )
    add("--coarse_steps", type=int, default=12000, help="batches (default: %(default)s)")
    add("--transformer_steps", type=int, default=20000, help="batches (default: %(default)s)")
    add_denoiser_arguments(parser)
    add_judging_arguments(parser, 50, 3.0, ROOT / "docs" / "images" / "tiny_pixart_samples.png")
    add_run_arguments(parser)
    args = settled(parser)
    if not (args.parts / INDEX).is_file():
        parser.error(f"--parts {args.parts}: expected a tiny-flux ({INDEX}); name one")
    settle_matcher(parser, args)
    return args


def main() -> None:
    args = parse_args()
    begin(args)
    emoji = load_emoji(args.data)
    args.plan = partial(plan_stage, args)
    if {*TRANSFORMERS, "export"} & set(args.stages):
        parts, transformer = Parts.load(args.parts), started(args, "transformer", build_transformer())
        latents = encoded(args, parts.vae, emoji)
        steps = {COARSE: args.coarse_steps, "transformer": args.transformer_steps}

        def foretell(noisy: torch.Tensor, times: torch.Tensor, said: list[str]) -> torch.Tensor:
            states, mask = parts.encode(said)
            return transformer(noisy, states, times, encoder_attention_mask=mask).sample

        train_denoiser(args, steps, transformer, build_scheduler(), latents, emoji, foretell)
    if "export" in args.stages:
        export(args, parts, transformer)
    if "judge" in args.stages:
        judge("tiny-pixart", args, emoji, ImageTextMatcher.load(args.matcher))


if __name__ == "__main__":
    main()
