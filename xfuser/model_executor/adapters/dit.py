"""DiT (arXiv 2212.09748): one stream, one list of blocks, timestep and label embedded in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.family import Family, ModelType, SmallPipeline, shipped
from xfuser.model_executor.adapters.spec import BlockGroup, KnownModel, ModelSpec

if TYPE_CHECKING:
    import torch
    from diffusers import DiTPipeline
    from torch import nn

THRESHOLDS = {"Fast": 0.05, "Tea": 0.1, "Fb": 0.08}
# The model that comes with the package: small and well trained, so that it moves less from step to step.
TINY = KnownModel(
    configuration={
        "num_layers": 12,
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "sample_size": 8,
        "patch_size": 1,
    },
    thresholds={"Fast": 0.016, "Tea": 0.06, "Fb": 0.05},
)
# The one of twice its depth.
TINY_DEEP = KnownModel(
    configuration={**TINY.configuration, "num_layers": 24, "attention_head_dim": 18}, thresholds=TINY.thresholds
)


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    hidden_states = arguments["hidden_states"]
    return block.norm1(
        hidden_states, arguments["timestep"], arguments["class_labels"], hidden_dtype=hidden_states.dtype
    )[0]


def build_small(seed: int = 0, layers: int = 4) -> DiTPipeline:
    """A class-conditional DiT of 16 tokens and 16 channels; its images have 4 x 4 pixels of one channel."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    from xfuser.model_executor.adapters.small import seeded

    with seeded(seed):
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=4,
            patch_size=1,
            num_embeds_ada_norm=1000,
        )
        autoencoder = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    pipeline = DiTPipeline(transformer.eval(), autoencoder.eval(), DDIMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny(name: str, known: KnownModel, made_by: str = "") -> ModelType:
    """Describe a small model that comes with the package, and is judged by the classifier that does."""
    return ModelType(
        SPEC.transformer_class,
        ("DiTPipeline",),
        lambda: shipped(name),
        "label",
        1.5,
        known.thresholds,
        evaluated=True,
        configuration=known.configuration,
        made_by=made_by,
    )


SPEC = ModelSpec(
    transformer_class="DiTTransformer2DModel",
    groups=(BlockGroup("transformer_blocks", self_attention=("attn1",)),),
    conditioning=("class_labels",),
    modulated_input=modulated_input,
    per_image=("hidden_states", "timestep", "class_labels"),
    tail_needs=("norm1.emb",),
    thresholds=THRESHOLDS,
    known_models=(TINY, TINY_DEEP),
)

FAMILY = Family(
    title="DiT",
    spec=SPEC,
    small={
        "dit": SmallPipeline(
            "DiTPipeline",
            build_small,
            lambda count: {"class_labels": [7 + index for index in range(count)], "guidance_scale": 1.0},
            guided=lambda count: {"guidance_scale": 1.5},
        )
    },
    types={
        "tiny-dit": tiny("tiny-dit", TINY),
        "tiny-dit-l": tiny("tiny-dit-l", TINY_DEEP, "scripts/train_tiny_dit.py --model tiny-dit-l"),
        "dit": ModelType(SPEC.transformer_class, ("DiTPipeline",), "facebook/DiT-XL-2-256", "label", 1.5, THRESHOLDS),
    },
)
