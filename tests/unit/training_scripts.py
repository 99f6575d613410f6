"""The training scripts as tests run them: imported, and on eight captions in two styles with a random tiny-flux."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from evaluation.metrics.matcher import ImageTextMatcher

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def import_scripts(*names: str) -> dict[str, ModuleType]:
    """Import training scripts, which import each other from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return {name: importlib.import_module(name) for name in names}


def write_emoji_and_flux(folder: Path) -> None:
    """Write ``emoji.npz``, and a ``tiny-flux`` of random weights with its matcher."""
    captions = np.array([f"{colour} {thing}" for colour in ("red", "blue") for thing in "apple heart cat key".split()])
    np.savez(
        folder / "emoji.npz",
        images=np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8),
        captions=np.tile(captions, 2),
        styles=np.repeat(["noto", "twemoji"], 8),
    )
    scripts = import_scripts("train_tiny_flux", "tiny_flux_parts")
    parts = scripts["tiny_flux_parts"]
    corpus = parts.Phrases(parts.load_emoji(folder / "emoji.npz")).corpus()
    torch.manual_seed(0)
    text = parts.TextEncoders(*(parts.train_tokenizer(corpus, clip=clip) for clip in (True, False)))
    args = argparse.Namespace(output=folder / "tiny-flux")
    scripts["train_tiny_flux"].export(args, parts.build_autoencoder(), text, parts.build_transformer())
    (args.output / "evaluation").mkdir()
    ImageTextMatcher(sorted(set(captions.tolist()))).save(args.output / "evaluation" / "matcher.safetensors")


def run(script: ModuleType, folder: Path, *arguments: str) -> None:
    """Run a training script as from the command line, on the folder's data and with one thread."""
    named = ["train", "--data", str(folder / "emoji.npz"), "--grid", str(folder / "grid.png"), "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*named, *arguments])
        script.main()


def train(script: ModuleType, folder: Path, model: str, *arguments: str) -> None:
    """Run the script of a model with parts of the folder's tiny-flux, beside which its own is written."""
    named = ["--parts", str(folder / "tiny-flux"), "--output", str(folder / model), "--batch_size=2"]
    run(script, folder, "--workdir", str(folder / "work"), *named, *arguments)
