"""Draw held-out scene graphs with a tiny-sgdiff, count which of their relations are shown, and lay out a grid."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from tiny_judging import AT_ONCE, draw, save_picture
from tiny_scenes import Composer, is_held_out

from evaluation.metrics.relations import RelationChecker, Sprites, share_right
from xfuser.core.files import write_json
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline

COLUMNS = 8


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
    drawn = draw(loaded, args, graphs, seed=1000).permute(0, 3, 1, 2)
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
    shown_first = (each[: 2 * COLUMNS].permute(0, 2, 3, 1).split(COLUMNS) for each in (real, drawn))
    # What was drawn of the composed scenes stands under them.
    save_picture([row for pair in zip(*shown_first, strict=True) for row in pair], args.grid)
