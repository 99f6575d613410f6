"""Draw held-out scene graphs with a tiny-sgdiff, count which of their relations are shown, and lay out a grid."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from tiny_scenes import Composer, is_held_out

from evaluation.metrics.relations import RelationChecker, Sprites, share_right
from xfuser.core.files import replacing, write_json
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline

AT_ONCE = 32
COLUMNS = 8


def add_judging_arguments(parser: argparse.ArgumentParser, grid: Path) -> None:
    """Add what the stage ``judge`` draws, and how."""
    add = parser.add_argument
    add("--judged", type=int, default=256, help="held-out graphs to judge by (default: %(default)s)")
    add("--judged_steps", type=int, default=50, help="denoising steps of judged images (default: %(default)s)")
    add("--guidance_scale", type=float, default=3.0, help="of judged images (default: %(default)s)")
    add("--grid", type=Path, default=grid, help="(default: %(default)s)")


def draw(loaded: LoadedPipeline, args: argparse.Namespace, graphs: Sequence[dict[str, Any]], seed: int) -> torch.Tensor:
    """One image of each graph, float32 [N, 3, 64, 64] in [0, 1]."""
    batches = []
    for start in track(range(0, len(graphs), AT_ONCE), description="judge       "):
        batch = list(graphs[start : start + AT_ONCE])
        seeds = [seed + start + index for index in range(len(batch))]
        batches.append(loaded.generate(batch, seeds, args.judged_steps, guidance_scale=args.guidance_scale))
    return torch.from_numpy(np.concatenate(batches)).permute(0, 3, 1, 2)


@torch.no_grad()
def decoded(loaded: LoadedPipeline, images: torch.Tensor) -> torch.Tensor:
    """The images after the autoencoder."""
    vae = loaded.pipeline.vae
    batches = [vae.decode(vae.encode(batch * 2 - 1).latent_dist.mode()).sample for batch in images.split(AT_ONCE)]
    return (torch.cat(batches) / 2 + 0.5).clamp(0, 1)


def judge(args: argparse.Namespace, sprites: Sprites) -> None:
    """Measure how many relations of held-out graphs are shown, and draw a grid."""
    loaded = load_pipeline("tiny-sgdiff", str(args.output))
    composer = Composer(sprites, held_out=True)
    scenes = [composer.compose(number) for number in range(args.judged)]
    graphs = [scene.graph for scene in scenes]
    real = torch.stack([scene.image for scene in scenes]) / 255
    checker = RelationChecker(sprites)
    drawn = draw(loaded, args, graphs, seed=1000)
    shown = checker.check(drawn, graphs)
    record: dict[str, Any] = {
        "graphs": len(graphs),
        "steps": args.judged_steps,
        "guidance_scale": args.guidance_scale,
        "composed": share_right(checker.check(real, graphs)),
        "after_autoencoder": share_right(checker.check(decoded(loaded, real), graphs)),
        "generated": share_right(shown),
        "generated_of_other_graphs": share_right(checker.check(drawn, graphs[1:] + graphs[:1])),
        "graphs_right": sum(map(all, shown)) / len(shown),
    }
    right, said = Counter[str](), Counter[str]()
    for graph, answers in zip(graphs, shown, strict=True):
        names = graph["objects"]
        for (subject, predicate, other), answer in zip(graph["relations"], answers, strict=True):
            held_out = is_held_out(names[subject], predicate, names[other])
            for kind in (predicate, "held out" if held_out else "not held out"):
                said[kind] += 1
                right[kind] += answer
    record["relations"] = {kind: [right[kind], said[kind]] for kind in sorted(said)}
    for name, value in record.items():
        print(f"judge        {name}: {value}")
    (args.output / "evaluation").mkdir(exist_ok=True)
    write_json(args.output / "evaluation" / "relations.json", record)
    save_grid(real[: 2 * COLUMNS], drawn[: 2 * COLUMNS], args.grid)


def save_grid(real: torch.Tensor, drawn: torch.Tensor, path: Path) -> None:
    """Lay out composed scenes, and what was drawn of their graphs under each."""
    rows = [row for pair in zip(real.split(COLUMNS), drawn.split(COLUMNS), strict=True) for row in pair]
    joined = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    grid = Image.fromarray((joined.permute(1, 2, 0) * 255).round().byte().numpy())
    grid = grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        grid.save(temporary, format="PNG")
