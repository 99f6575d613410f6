"""Make clips with tiny-wan, count whether object and direction are what was asked for, and lay some out."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from tiny_judging import draw, enlarged, save_picture
from tiny_wan_clips import Pair, Sprites, caption_of, draw_clips, split_pairs

from evaluation.metrics.tracking import ObjectTracker
from xfuser.core.files import replacing, write_json
from xfuser.model_executor.pipelines import load_pipeline

OBJECTS_FILE = "objects.safetensors"
SHOWN = (
    *(("rocket", "up"), ("turtle", "right"), ("blue heart", "left"), ("cat face", "down")),
    *(("taxi", "right"), ("pineapple", "down"), ("crab", "up"), ("strawberry", "left")),
)
SHOWN_FRAMES = (0, 3, 6, 9, 12)
MILLISECONDS = 120  # a frame of the animation


def save_objects(sprites: Sprites, output: Path) -> None:
    """Write what the checker looks for, and the captions that were trained on, into a model's folder."""
    captions = [caption_of(pair) for pair in split_pairs(sprites.names)[0]]
    tracker = ObjectTracker(sprites.names, sprites.through, sprites.own, captions)
    (output / "evaluation").mkdir(exist_ok=True)
    with replacing(output / "evaluation" / OBJECTS_FILE) as temporary:
        tracker.save(temporary)


def spread_pairs(pairs: list[Pair], count: int) -> list[Pair]:
    """Take so many pairs at even distances, some several times where there are fewer."""
    places = np.arange(count) if count > len(pairs) else np.linspace(0, len(pairs) - 1, count).round().astype(int)
    return [pairs[place % len(pairs)] for place in places.tolist()]


def rates(tracker: ObjectTracker, clips: torch.Tensor, pairs: list[Pair]) -> dict[str, float | int]:
    """Count in how many clips the object, its direction and both are right."""
    tracks = [tracker.track(clip) for clip in clips]
    right = [(each.name == pair[0], each.direction == pair[1]) for each, pair in zip(tracks, pairs, strict=True)]
    return {
        "object": float(np.mean([thing for thing, _ in right])),
        "direction": float(np.mean([direction for _, direction in right])),
        "both": float(np.mean([all(each) for each in right])),
        "explained": float(np.mean([each.explained for each in tracks])),
        "clips": len(pairs),
    }


@torch.no_grad()
def through_autoencoder(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Encode and decode clips [N, 3, F, H, W] in [0, 1]."""
    latents = (vae.encode(each * 2 - 1).latent_dist.mode() for each in clips.split(8))
    return torch.cat([vae.decode(each).sample for each in latents]) / 2 + 0.5


def judge(args: argparse.Namespace, vae: AutoencoderKLWan, sprites: Sprites) -> None:
    """Measure how often the checker finds what was asked for, in composed and in generated clips, and show some."""
    loaded = load_pipeline("tiny-wan", str(args.output))
    tracker = ObjectTracker.load(args.output / "evaluation" / OBJECTS_FILE)
    trained, held_out = (spread_pairs(pairs, args.judged) for pairs in split_pairs(sprites.names))
    composed = draw_clips(sprites, trained, torch.Generator().manual_seed(1 << 20))
    record = {
        "composed": rates(tracker, composed.permute(0, 2, 3, 4, 1), trained),
        "autoencoded": rates(tracker, through_autoencoder(vae, composed).permute(0, 2, 3, 4, 1), trained),
        "trained_pairs": rates(tracker, draw(loaded, args, list(map(caption_of, trained)), seed=1000), trained),
        "held_out_pairs": rates(tracker, draw(loaded, args, list(map(caption_of, held_out)), seed=2000), held_out),
    }
    for name, found in record.items():
        told = ", ".join(f"{each} {found[each]:.3f}" for each in ("object", "direction", "both", "explained"))
        print(f"judge        {name}, {found['clips']} clips: {told}")
    record |= {"steps": args.judged_steps, "guidance_scale": args.guidance_scale}
    write_json(args.output / "evaluation" / "tracked.json", record)
    show(draw(loaded, args, list(map(caption_of, SHOWN)), seed=0), args.grid, args.animation)


def show(clips: torch.Tensor, grid: Path, animation: Path) -> None:
    """Write a picture with a row of frames for each two clips, and an animation with all of them side by side."""
    stills = clips[:, list(SHOWN_FRAMES)]
    save_picture([torch.cat(pair) for pair in zip(stills[::2].unbind(), stills[1::2].unbind(), strict=True)], grid)
    half = len(clips) // 2
    frames = [
        enlarged(torch.cat([torch.cat(list(row), dim=1) for row in moment.split(half)]))
        for moment in clips.unbind(dim=1)
    ]
    animation.parent.mkdir(parents=True, exist_ok=True)
    moving = {"save_all": True, "append_images": frames[1:], "duration": MILLISECONDS, "loop": 0, "quality": 80}
    with replacing(animation) as temporary:
        frames[0].save(temporary, format="WEBP", **moving)
