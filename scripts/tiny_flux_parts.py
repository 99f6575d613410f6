"""The parts of ``tiny-flux`` before training: autoencoder, tokenizers, text encoders, transformer, and its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

SIZE = 64  # pixels
THUMBNAIL = 16  # pixels
LATENT_CHANNELS = 4
CLIP_HIDDEN, CLIP_TOKENS = 128, 20
T5_HIDDEN, T5_TOKENS = 96, 16
VOCABULARY = 1536


@dataclass(frozen=True)
class Emoji:
    """Captioned emoji: images uint8 [N, 3, 64, 64]; captions, styles; ``held_out`` bool [N], never trained on."""

    images: torch.Tensor
    captions: list[str]
    styles: list[str]
    held_out: torch.Tensor

    @property
    def trained_on(self) -> torch.Tensor:
        """Indices of the images that are trained on."""
        return (~self.held_out).nonzero()[:, 0]


def load_emoji(path: Path, share_held_out: float = 0.1, seed: int = 0) -> Emoji:
    """Read ``emoji64.npz`` and hold out one style of a share of the captions that are there in two."""
    with np.load(path) as archive:
        images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2).contiguous()
        captions = [str(caption) for caption in archive["captions"]]
        styles = [str(style) for style in archive["styles"]]
    at: dict[str, list[int]] = {}
    for index, caption in enumerate(captions):
        at.setdefault(caption, []).append(index)
    pairs = sorted(caption for caption, indices in at.items() if len(indices) == 2)
    generator = np.random.default_rng(seed)
    held_out = torch.zeros(len(captions), dtype=torch.bool)
    for caption in generator.choice(pairs, size=round(share_held_out * len(pairs)), replace=False):
        held_out[at[str(caption)][generator.integers(2)]] = True
    return Emoji(images, captions, styles, held_out)


def build_autoencoder() -> AutoencoderKL:
    """Sixteen-fold fewer pixels, four channels: 64 x 64 images become 64 tokens of 16 channels when FLUX packs them."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


class Phrases:
    """Prompts as people would type them, made from captions: templates, dropped words, the style where it is told."""

    templates = ("{}",) * 6 + ("a {}", "{} emoji", "an emoji of {}", "the {}")

    def __init__(self, emoji: Emoji) -> None:
        self.captions, self.styles = emoji.captions, emoji.styles

    def corpus(self) -> list[str]:
        """What the tokenizers learn from: each caption in each template, and with each style."""
        captions = sorted(set(self.captions))
        plain = [template.format(caption) for caption in captions for template in sorted(set(self.templates))]
        return plain + [f"{caption}, {style}" for caption in captions for style in sorted(set(self.styles))]

    def __call__(self, indices: torch.Tensor, generator: torch.Generator) -> list[str]:
        """One phrase for each image; half of them end in the style, as ``red apple, noto``."""
        return [self._phrase(index, generator) for index in indices.tolist()]

    def _phrase(self, index: int, generator: torch.Generator) -> str:
        styled, dropping, template = torch.rand(3, generator=generator).tolist()
        words = self.captions[index].split()
        if words[-1] == "flag" and dropping > 0.75:
            words = ["flag", "of", *words[:-1]]
        if len(words) > 2 and dropping < 0.15:
            kept = torch.rand(len(words), generator=generator) > 1.2 / len(words)
            words = [word for word, keep in zip(words, kept.tolist(), strict=True) if keep] or words
        phrase = self.templates[int(template * len(self.templates))].format(" ".join(words))
        return f"{phrase}, {self.styles[index]}" if styled < 0.5 else phrase


def train_tokenizer(corpus: list[str], *, clip: bool) -> PreTrainedTokenizerFast:
    """Learn byte pairs from the corpus, with the special tokens and the padding of CLIP or of T5."""
    special = ["<|startoftext|>", "<|endoftext|>", "<|unknown|>"] if clip else ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE(unk_token=special[2]))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A {special[1]}" if clip else f"$A {special[1]}",
        special_tokens=[(token, number) for number, token in enumerate(special)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0] if clip else None,
        eos_token=special[1],
        unk_token=special[2],
        pad_token=special[1] if clip else special[0],
        model_max_length=CLIP_TOKENS if clip else T5_TOKENS,
        padding_side="right",
    )


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    """Two layers of 128 channels; the pooled state at the end of the text conditions every block."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_HIDDEN,
        intermediate_size=2 * CLIP_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=CLIP_HIDDEN,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Two layers of 96 channels; each token's state is a token of the transformer."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_HIDDEN,
        d_kv=T5_HIDDEN // 4,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_transformer() -> FluxTransformer2DModel:
    """Six dual and six single blocks of 4 heads, 28 channels each."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=6,
        num_single_layers=6,
        attention_head_dim=28,
        num_attention_heads=4,
        joint_attention_dim=T5_HIDDEN,
        pooled_projection_dim=CLIP_HIDDEN,
        guidance_embeds=True,
        axes_dims_rope=(8, 10, 10),
    )
    # Each block starts as the identity and the output as zero (DiT, arXiv 2212.09748, section 3.2).
    zeroed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    zeroed += [block.norm.linear for block in transformer.single_transformer_blocks]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


class TextEncoders(nn.Module):
    """Both text encoders with their tokenizers, and the heads that only their training needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokenizer_2: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizers = (tokenizer, tokenizer_2)
        self.clip, self.t5 = build_clip(tokenizer), build_t5(tokenizer_2)
        # The fused attention's backward pass takes four times as long in bfloat16 on a CPU.
        self.clip.set_attn_implementation("eager")
        self.into_thumbnail = nn.ModuleList(nn.Linear(width, 3 * THUMBNAIL**2) for width in (CLIP_HIDDEN, T5_HIDDEN))

    def encode(self, phrases: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's pooled state [N, 128] and T5's states [N, 16, 96], as FluxPipeline computes them."""
        ids, ids_2 = (
            tokenizer(phrases, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for tokenizer in self.tokenizers
        )
        return self.clip(ids).pooler_output, self.t5(ids_2).last_hidden_state

    def thumbnails(self, phrases: list[str]) -> list[torch.Tensor]:
        """What each encoder's vectors foretell of the images, [N, 3, 16, 16], white being 0 and black 2."""
        pooled, states = self.encode(phrases)
        pairs = zip(self.into_thumbnail, (pooled, states.mean(dim=1)), strict=True)
        return [head(vector).unflatten(1, (3, THUMBNAIL, THUMBNAIL)) for head, vector in pairs]
