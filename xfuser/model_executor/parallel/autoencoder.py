"""Decoding in patches on all ranks that share an image, through DistVAE."""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist
from diffusers import AutoencoderKL
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import nn


class ParallelDecoder:
    """Puts a decoder that works in bands of rows into a pipeline's autoencoder, and takes it out again.

    Raises:
        ValueError: DistVAE cannot spread this autoencoder. Nothing has been changed.
    """

    def __init__(self, autoencoder: Any, group: dist.ProcessGroup | None) -> None:
        check_decoder(autoencoder)
        from distvae.modules.adapters.vae.decoder_adapters import DecoderAdapter

        self._autoencoder, self._own = autoencoder, autoencoder.decoder
        # DistVAE builds its layers into the decoder that it is given; a copy with the same weights leaves ours whole.
        weights = {id(each): each for each in (*self._own.parameters(), *self._own.buffers())}
        autoencoder.decoder = DecoderAdapter(copy.deepcopy(self._own, weights), vae_group=group)

    def undo(self) -> None:
        self._autoencoder.decoder = self._own


def check_decoder(autoencoder: Any) -> None:
    """Refuse an autoencoder that DistVAE's decoder does not fit (ValueError)."""
    name = type(autoencoder).__name__
    if not isinstance(autoencoder, AutoencoderKL):
        raise ValueError(f"--use_parallel_vae spreads an AutoencoderKL, and this pipeline has {name}; leave it out")
    decoder = autoencoder.decoder
    odd = [type(each).__name__ for each in decoder.up_blocks if not isinstance(each, UpDecoderBlock2D)]
    if not isinstance(decoder.conv_norm_out, nn.GroupNorm):
        odd.append(type(decoder.conv_norm_out).__name__)
    if odd:
        raise ValueError(f"--use_parallel_vae cannot spread this {name}'s {odd[0]}; leave it out")
    if autoencoder.use_tiling:
        raise ValueError("--use_parallel_vae and --enable_tiling both cut the image; name one of them")
