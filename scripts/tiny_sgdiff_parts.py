"""The parts of ``tiny-sgdiff`` before training, what only its training needs, and its scenes."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_flux_parts import LATENT_CHANNELS
from tiny_scenes import IMAGE, MOST_OBJECTS, MOST_RELATIONS, OBJECTS, Composer
from torch import nn
from training import origin

from evaluation.metrics.relations import PREDICATES
from xfuser.core.files import replacing
from xfuser.model_executor.pipelines.scene_graph_encoder import SceneGraphEncoder

GRAPH_WIDTH = 64
PATCH = 2  # latents a side of what the pretraining masks
PATCHES = (IMAGE // 4 // PATCH) ** 2
CHANNELS = (48, 96, 96)
MASKED = 0.7  # of the patches


def build_encoder() -> SceneGraphEncoder:
    """Three graph convolutions of 64 channels; tokens of 192."""
    return SceneGraphEncoder(OBJECTS, PREDICATES, MOST_OBJECTS, MOST_RELATIONS, GRAPH_WIDTH)


def build_unet() -> UNet2DConditionModel:
    """Residual blocks on 16 x 16 places, and transformer blocks on 8 x 8 and 4 x 4, of 4 heads."""
    return UNet2DConditionModel(
        sample_size=IMAGE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=3 * GRAPH_WIDTH,
        attention_head_dim=4,
    )


def build_scheduler() -> DDIMScheduler:
    """A thousand steps of linear variance, as tiny-sd's, of which DDIM takes some, from the noisiest on.

    Velocities (arXiv 2202.00512) weigh the noisiest times more than noise does, which is where the layout is settled.
    """
    return DDIMScheduler(timestep_spacing="trailing", clip_sample=False, steps_offset=1, prediction_type="v_prediction")


@dataclass(frozen=True)
class Scenes:
    """Images uint8 [N, 3, 64, 64], and their graphs."""

    images: torch.Tensor
    graphs: list[dict[str, Any]]


def cached_scenes(workdir: Path, composer: Composer, count: int) -> Scenes:
    """The first scenes of a composer, kept in the working folder; one of other scenes is made anew."""
    path = workdir / "scenes.safetensors"
    made_of = json.dumps([composer.seed, composer.held_out, count, OBJECTS])
    if path.exists():
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
            if metadata.get("made_of") == made_of:
                return Scenes(opened.get_tensor("images"), json.loads(metadata["graphs"]))
    scenes = [composer.compose(number) for number in track(range(count), description="scenes      ")]
    images, graphs = torch.stack([scene.image for scene in scenes]), [scene.graph for scene in scenes]
    with replacing(path) as temporary:
        save_file({"images": images}, temporary, metadata={"made_of": made_of, "graphs": json.dumps(graphs)})
    return Scenes(images, graphs)


@torch.no_grad()
def cached_latents(args: argparse.Namespace, vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents [N, 4, 16, 16], kept for as long as the scenes and the autoencoder's weights are the same."""
    path = args.workdir / "latents.safetensors"
    scenes = args.workdir / "scenes.safetensors"
    made_of = f"{scenes.stat().st_mtime_ns} {origin(args, 'autoencoder', 'vae')}"
    if path.exists():
        with safe_open(path, framework="pt") as opened:
            if (opened.metadata() or {}).get("made_of") == made_of:
                return opened.get_tensor("latents")
    batches = track(images.split(64), description="latents     ")
    with args.autocast():
        latents = torch.cat([vae.encode(batch / 127.5 - 1).latent_dist.mode().float() for batch in batches])
    with replacing(path) as temporary:
        save_file({"latents": latents}, temporary, metadata={"made_of": made_of})
    return latents


class Pretraining(nn.Module):
    """The graph encoder with what its masked-contrastive pretraining needs besides, on latents.

    A transformer sees the graph's tokens and the patches that are not masked, and foretells the others. An image
    encoder's vector and the graph's own are to find each other among those of a batch (InfoNCE, as CLIP).
    """

    def __init__(self, encoder: SceneGraphEncoder, width: int = 96) -> None:
        super().__init__()
        self.encoder = encoder
        inputs, tokens = LATENT_CHANNELS * PATCH**2, 3 * GRAPH_WIDTH
        self.of_patch, self.of_token = nn.Linear(inputs, width), nn.Linear(tokens, width)
        self.place = nn.Parameter(0.02 * torch.randn(PATCHES, width))
        self.masked = nn.Parameter(0.02 * torch.randn(width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.into_patch = nn.Linear(width, inputs)
        self.of_image = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 48, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(48, 96, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96 * 16, width),
        )
        self.of_graph = nn.Linear(tokens, width)
        self.temperature = nn.Parameter(torch.tensor(0.07).log())

    def losses(self, latents: torch.Tensor, numbers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Masked and contrastive loss [2] of a batch."""
        tokens = self.encoder(numbers)
        patches = F.unfold(latents, PATCH, stride=PATCH).transpose(1, 2)
        masked = torch.rand(patches.shape[:2], generator=generator) < MASKED
        seen = torch.where(masked[..., None], self.masked, self.of_patch(patches)) + self.place
        states = self.transformer(torch.cat([self.of_token(tokens), seen], dim=1))
        foretold = self.into_patch(states[:, tokens.shape[1] :])
        reconstruction = F.mse_loss(foretold[masked], patches[masked])
        graphs = F.normalize(self.of_graph(tokens[:, -1]), dim=1)
        images = F.normalize(self.of_image(latents), dim=1)
        likeness = graphs @ images.T / self.temperature.exp()
        own = torch.arange(len(latents))
        contrast = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
        return torch.stack([reconstruction, contrast])
