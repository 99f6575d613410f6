"""The UNet of Stable Diffusion 1, 2 and XL (arXiv 2112.10752): transformer blocks of several widths between residual
and resampling ones, which always run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.family import Family, ModelType, SmallPipeline, shipped
from xfuser.model_executor.adapters.spec import BlockGroup, ModelSpec

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from torch import nn

SIDE = 32  # pixels of the toy's images
THRESHOLDS = {"Fast": 0.05, "Tea": 0.05, "Fb": 0.05}  # the methods' common ones: nobody has published any for a UNet
# What tells tiny-sd, the model that comes with the package, from others of its pipeline.
TINY = {"block_out_channels": [64, 128], "cross_attention_dim": 128, "sample_size": 16}


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    # The timestep reaches these blocks through the residual ones alone, so there is no scale and shift.
    hidden_states = arguments["hidden_states"]
    return block.norm1(hidden_states) if block.norm_type == "layer_norm" else hidden_states


def build_small(seed: int = 0) -> StableDiffusionPipeline:
    """Seven transformer blocks, of 16 channels on 64 tokens and of 32 on 16."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from xfuser.model_executor.adapters import small

    with small.seeded(seed):
        unet = UNet2DConditionModel(
            sample_size=SIDE // 4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=small.HIDDEN,
            attention_head_dim=4,
        )
        return StableDiffusionPipeline(
            unet=unet.eval(),
            scheduler=DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False),
            vae=small.small_autoencoder(),
            text_encoder=CLIPTextModel(small.small_clip_config()).eval(),
            tokenizer=small.byte_tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _ask(count: int) -> dict[str, Any]:
    prompts = [f"fox number {index}" for index in range(count)]
    return {"prompt": prompts, "height": SIDE, "width": SIDE, "guidance_scale": 1.0}


SPEC = ModelSpec(
    transformer_class="UNet2DConditionModel",
    groups=tuple(
        BlockGroup(path, self_attention=("attn1",))
        for path in (
            "down_blocks.*.attentions.*.transformer_blocks",
            "mid_block.attentions.*.transformer_blocks",
            "up_blocks.*.attentions.*.transformer_blocks",
        )
    ),
    conditioning=("encoder_hidden_states",),
    modulated_input=modulated_input,
    contiguous=False,
    same_tokens=False,
    sample="sample",
    components=("unet",),
    thresholds=THRESHOLDS,
    per_image=(
        *("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask"),
        *("encoder_attention_mask", "text_embeds", "time_ids", "image_embeds", "down_block_additional_residuals"),
        *("mid_block_additional_residual", "down_intrablock_additional_residuals", "hidden_states"),
    ),
)

FAMILY = Family(
    title="Stable Diffusion 1, 2 (UNet)",
    spec=SPEC,
    small={
        "unet": SmallPipeline(
            "StableDiffusionPipeline", build_small, _ask, guided=lambda count: {"guidance_scale": 7.5}
        )
    },
    types={
        "sd": ModelType(
            SPEC.transformer_class,
            ("StableDiffusionPipeline",),
            None,
            "prompt",
            7.5,
            THRESHOLDS,
            toy=build_small,
            reads_length=False,
        ),
        "tiny-sd": ModelType(
            SPEC.transformer_class,
            ("StableDiffusionPipeline",),
            lambda: shipped("tiny-sd"),
            "prompt",
            3.0,
            THRESHOLDS,
            toy=build_small,
            call_arguments={"height": 64, "width": 64},
            configuration=TINY,
            reads_length=False,
        ),
        "tiny-sgdiff": ModelType(
            SPEC.transformer_class,
            ("SceneGraphPipeline",),
            lambda: shipped("tiny-sgdiff"),
            "scene_graph",
            6.0,
            THRESHOLDS,
            reads_length=False,
            module="xfuser.model_executor.pipelines.scene_graph",
        ),
    },
)
