"""Draw prompts with a small text-to-image model, count how many a matcher recognises, and lay out a grid of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from tiny_flux_parts import Emoji
from tiny_flux_text import found, report_matcher

from evaluation.metrics.matcher import ImageTextMatcher
from xfuser.core.files import replacing, write_json
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline

DRAWN = (
    *("red apple", "blue heart", "cat face", "dog face", "rose", "pizza", "rocket", "automobile"),
    *("germany flag", "japan flag", "smiling face with sunglasses", "crying face", "tiger face", "bear face"),
    *("banana", "watermelon", "christmas tree", "white medium star", "sunflower", "key", "soccer ball", "octopus"),
    *("crescent moon", "thumbs up sign"),
)
AT_ONCE = 16
ENLARGED = 2


def add_judging_arguments(
    parser: argparse.ArgumentParser, steps: int, guidance_scale: float, grid: Path, judged: int = 190
) -> None:
    """Add what the stage ``judge`` draws, and how, with a model's own defaults."""
    add = parser.add_argument
    add("--judged", type=int, default=judged, help="held-out conditions to judge by (default: %(default)s)")
    add("--judged_steps", type=int, default=steps, help="denoising steps of what is judged (default: %(default)s)")
    add("--guidance_scale", type=float, default=guidance_scale, help="of what is judged (default: %(default)s)")
    add("--grid", type=Path, default=grid, help="picture of some (default: %(default)s)")


def draw(loaded: LoadedPipeline, args: argparse.Namespace, conditions: Sequence[Any], seed: int) -> torch.Tensor:
    """Generate one image or clip for each condition, float32 [N, …, H, W, 3] in [0, 1]."""
    batches = []
    for start in track(range(0, len(conditions), AT_ONCE), description="judge       "):
        batch = list(conditions[start : start + AT_ONCE])
        seeds = [seed + start + index for index in range(len(batch))]
        made = loaded.generate(batch, seeds, args.judged_steps, guidance_scale=args.guidance_scale)
        batches.append(torch.from_numpy(made))
    return torch.cat(batches)


def save_picture(rows: Sequence[torch.Tensor], path: Path) -> None:
    """Write rows of images [N, H, W, 3] in [0, 1], twice as wide and high, as PNG."""
    joined = torch.cat([torch.cat(list(row), dim=1) for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        enlarged(joined).save(temporary, format="PNG")


def enlarged(pixels: torch.Tensor) -> Image.Image:
    """Make a picture of [H, W, 3] in [0, 1], twice as wide and high."""
    image = Image.fromarray((pixels * 255).round().byte().numpy())
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.LANCZOS)


def judge(model_type: str, args: argparse.Namespace, emoji: Emoji, matcher: ImageTextMatcher) -> None:
    """Measure how often the matcher finds the captions of held-out and of generated images, and draw a grid."""
    real = report_matcher(emoji, matcher)["held out"]
    captions = [emoji.captions[index] for index in emoji.held_out.nonzero()[:, 0].tolist()][: args.judged]
    loaded = load_pipeline(model_type, str(args.output))
    share = found(matcher, draw(loaded, args, captions, seed=1000).permute(0, 3, 1, 2), captions)
    print(f"judge        {len(captions)} generated images: caption in its top 10: {share:.3f} (real ones: {real:.3f})")
    record = {"real": real, "generated": share, "images": len(captions), "steps": args.judged_steps}
    record["guidance_scale"] = args.guidance_scale
    (args.output / "evaluation").mkdir(exist_ok=True)
    write_json(args.output / "evaluation" / "matched.json", record)
    save_picture(draw(loaded, args, list(DRAWN) * 2, seed=0).split(8), args.grid)
