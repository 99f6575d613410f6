"""A FluxPipeline of toy size with random weights: every real part, no download. Its images are coloured noise."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

SIZE = 64
HIDDEN = 32


def build_toy_flux(seed: int = 0) -> FluxPipeline:
    """Three dual and five single blocks of 4 heads, 16 channels each, a 64-pixel image of 64 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=3,
            num_single_layers=5,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=HIDDEN,
            pooled_projection_dim=HIDDEN,
            axes_dims_rope=(4, 4, 8),
        )
        # A trained model is smooth in time; random weights on the embedding's high frequencies are not.
        with torch.no_grad():
            transformer.time_text_embed.timestep_embedder.linear_1.weight.mul_(0.1)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
            scaling_factor=1.0,
        )
        tokenizer = _byte_tokenizer()
        common = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **common
            )
        )
        t5 = T5EncoderModel(T5Config(d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **common))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder.eval(),
        text_encoder=clip.eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=_byte_tokenizer(),
        transformer=transformer.eval(),
    )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any prompt has tokens of its own without a trained vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", model_max_length=77, padding_side="right"
    )
