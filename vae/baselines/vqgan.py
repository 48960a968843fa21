"""VQGAN f8 with 8192 codes and a Gumbel quantiser (taming-transformers' `vqgan_gumbel_f8`; paper Table 1, "VQGAN").

Official file: heibox.uni-heidelberg.de/d/2e5662443a6b4307b470, checkpoints/last.ckpt (code MIT, weights without a
licence of their own). The blocks are diffusers' Encoder and Decoder, which compute the same as taming's
`modules/diffusionmodules/model.py`; the quantiser is ours, because diffusers' VQModel looks up the nearest
embedding while this release projects to logits.

Known deviation: taming adds Gumbel noise to the logits even in evaluation, so its reconstruction is random. The
default here is the most likely code; `gumbel_sample=True` draws as upstream does.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vae.baselines.common import Baseline, VideoVQOutput, check_frame_batch, decoder_output, map_frames


class GumbelQuantizer(nn.Module):
    """1x1 convolution to one logit per code; the chosen code's embedding is the latent."""

    def __init__(self, channels: int, num_codes: int, code_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, num_codes, 1)
        self.embedding = nn.Embedding(num_codes, code_dim)

    def forward(self, h: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Choose codes (N, h, w) of h (N, C, h, w): argmax of the logits, after Gumbel noise if `sample`."""
        logits = self.proj(h)  # (N, codes, h, w)
        # -log of an exponential draw is a Gumbel draw: the argmax is then a sample of the softmax.
        if sample:
            device = logits.device if generator is None else generator.device
            noise = torch.empty(logits.shape, device=device).exponential_(generator=generator).log_()
            logits = logits - noise.to(logits.device, logits.dtype)
        return logits.argmax(1)


class GumbelVQGAN(Baseline):
    """Discrete image VAE on every frame. Any T; latents (B, C, T, H/8, W/8), codes (B, T, H/8, W/8).

    Reconstruction only: it has no scaling rule and no place in stage two. `frame_batch` frames go through the
    network at a time.
    """

    causal = True
    discrete = True
    _tiling_refusal = "frames are independent; config.frame_batch bounds the memory"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 256,
        z_channels: int = 256,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        num_codes: int = 8192,
        gumbel_sample: bool = False,
        frame_batch: int = 8,
    ):
        super().__init__()
        check_frame_batch(frame_batch)
        levels, widths = len(block_out_channels), tuple(block_out_channels)
        self.spatial_compression_ratio = 2 ** (levels - 1)
        shared = {
            "block_out_channels": widths,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
        }
        # Attention at the lowest level: taming places it where 256 pixels have become 32.
        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=z_channels,
            down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
            double_z=False,
            **shared,
        )
        self.decoder = Decoder(
            in_channels=z_channels,
            out_channels=out_channels,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
            **shared,
        )
        self.quant_conv = nn.Conv2d(z_channels, latent_channels, 1)
        self.quantize = GumbelQuantizer(latent_channels, num_codes, latent_channels)
        self.post_quant_conv = nn.Conv2d(latent_channels, z_channels, 1)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True, generator: torch.Generator | None = None):
        """Encode x (B, 3, T, H, W) in [-1, 1] to latents (B, C, T, H/8, W/8) and codes (B, T, H/8, W/8).

        `generator` draws the Gumbel noise of config.gumbel_sample.
        """
        self.check_video(x)
        sample = self.config.gumbel_sample

        def codes_of(part: Tensor) -> Tensor:
            h = self.quant_conv(self.encoder(part))
            return self.quantize(h, sample, generator).unsqueeze(1)

        codes = map_frames(codes_of, x, self.config.frame_batch).squeeze(1)
        latents = self.embed(codes)
        return VideoVQOutput(latents=latents, codes=codes) if return_dict else (latents, codes)

    def embed(self, codes: Tensor) -> Tensor:
        """Look up the latents (B, C, T, h, w) of codes (B, T, h, w)."""
        return self.quantize.embedding(codes).movedim(-1, 1)

    @apply_forward_hook
    def decode(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True):
        """Decode z (B, C, T, h, w), codebook entries, to DecoderOutput of (B, 3, T, 8h, 8w)."""
        self.check_latents(z, num_frames)
        frames = map_frames(lambda part: self.decoder(self.post_quant_conv(part)), z, self.config.frame_batch)
        return decoder_output(frames, return_dict)
