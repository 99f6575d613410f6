"""Draw prompts with a small text-to-image model, count how many a matcher recognises, and lay out a grid of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track
from tiny_flux_parts import Emoji
from tiny_flux_text import found, report_matcher

from evaluation.metrics.matcher import ImageTextMatcher
from xfuser.core.files import replacing, write_json
from xfuser.model_executor.pipelines import load_pipeline

DRAWN = (
    *("red apple", "blue heart", "cat face", "dog face", "rose", "pizza", "rocket", "automobile"),
    *("germany flag", "japan flag", "smiling face with sunglasses", "crying face", "tiger face", "bear face"),
    *("banana", "watermelon", "christmas tree", "white medium star", "sunflower", "key", "soccer ball", "octopus"),
    *("crescent moon", "thumbs up sign"),
)
AT_ONCE = 16


def add_judging_arguments(parser: argparse.ArgumentParser, steps: int, guidance_scale: float, grid: Path) -> None:
    """Add what the stage ``judge`` draws, and how, with a model's own defaults."""
    add = parser.add_argument
    add("--judged", type=int, default=190, help="images to judge (default: all held-out captions)")
    add("--judged_steps", type=int, default=steps, help="denoising steps of judged images (default: %(default)s)")
    add("--guidance_scale", type=float, default=guidance_scale, help="of judged images (default: %(default)s)")
    add("--grid", type=Path, default=grid, help="(default: %(default)s)")


def draw(model_type: str, args: argparse.Namespace, prompts: list[str], seed: int) -> torch.Tensor:
    """One image of the exported model for each prompt, float32 [N, 3, 64, 64] in [0, 1]."""
    loaded = load_pipeline(model_type, str(args.output))
    batches = []
    for start in track(range(0, len(prompts), AT_ONCE), description="judge       "):
        batch = prompts[start : start + AT_ONCE]
        seeds = [seed + start + index for index in range(len(batch))]
        images = loaded.generate(batch, seeds, args.judged_steps, guidance_scale=args.guidance_scale)
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.cat(batches)


def judge(model_type: str, args: argparse.Namespace, emoji: Emoji, matcher: ImageTextMatcher) -> None:
    """Measure how often the matcher finds the captions of held-out and of generated images, and draw a grid."""
    real = report_matcher(emoji, matcher)["held out"]
    captions = [emoji.captions[index] for index in emoji.held_out.nonzero()[:, 0].tolist()][: args.judged]
    share = found(matcher, draw(model_type, args, captions, seed=1000), captions)
    print(f"judge        {len(captions)} generated images: caption in its top 10: {share:.3f} (real ones: {real:.3f})")
    record = {"real": real, "generated": share, "images": len(captions), "steps": args.judged_steps}
    record["guidance_scale"] = args.guidance_scale
    (args.output / "evaluation").mkdir(exist_ok=True)
    write_json(args.output / "evaluation" / "matched.json", record)
    rows = [torch.cat(list(row), dim=2) for row in draw(model_type, args, list(DRAWN) * 2, seed=0).split(8)]
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte().numpy()
    grid = Image.fromarray(pixels)
    grid = grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.LANCZOS)
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.grid) as temporary:
        grid.save(temporary, format="PNG")
