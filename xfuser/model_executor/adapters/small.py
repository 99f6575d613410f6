"""What the toy pipelines share: small text encoders and autoencoders with random weights, nothing to download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel, CLIPTextConfig, PreTrainedTokenizerFast, T5Config, T5EncoderModel

SIZE = 64  # pixels
HIDDEN = 32  # channels of a text encoder


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights of this seed, without touching the caller's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    """Draw a normal tensor, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_in_time(timestep_embedder: nn.Module) -> None:
    """A trained model is smooth in time; random weights on the embedding's high frequencies are not."""
    with torch.no_grad():
        timestep_embedder.linear_1.weight.mul_(0.1)


@torch.no_grad()
def strengthen(model: nn.Module, factor: float = 2.0) -> None:
    """Scale a model's matrices, where random ones are too small for its blocks to matter."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(factor)


def small_autoencoder(levels: int = 3) -> AutoencoderKL:
    """Latents of 4 channels; each level but the first halves the image's height and width."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()


def small_clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=HIDDEN,
        **_vocabulary(),
    )


def small_bert() -> BertModel:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, **_vocabulary())).eval()


def small_t5(channels: int = HIDDEN) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(d_model=channels, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **_vocabulary())
    ).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any prompt has tokens of its own without a trained vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=77,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def _vocabulary() -> dict[str, Any]:
    return {"vocab_size": len(byte_tokenizer()), "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
