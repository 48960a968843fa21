"""SD-VAE: Stable Diffusion's image VAE on every frame (paper Table 1, "SD-VAE" / "SD2.1-VAE").

Weights: stabilityai/sd-vae-ft-mse (MIT), which Open-Sora-Plan's v1.2.0 report links under the name SD2.1 VAE.
The network is diffusers' AutoencoderKL; any AutoencoderKL folder opens as it is.
"""

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - a pipeline looks here for what can load it
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from vae.baselines.common import Baseline, check_frame_batch, decoder_output, map_frames, posterior_output

_COPIED = (
    "in_channels out_channels latent_channels block_out_channels layers_per_block norm_num_groups "
    "use_quant_conv use_post_quant_conv mid_block_add_attention"
).split()


class SDVAE(Baseline):
    """An AutoencoderKL that takes clips: frames are images, one posterior covers the clip.

    Any T; latents (B, C, T, H/8, W/8). `frame_batch` frames go through the network at a time; the posterior is
    made of their concatenated moments, so a draw does not depend on frame_batch.
    """

    causal = True
    _tiling_refusal = "frames are independent; config.frame_batch bounds the memory"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        scaling_factor: float = 0.18215,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        frame_batch: int = 8,
    ):
        super().__init__()
        check_frame_batch(frame_batch)
        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)
        self.autoencoder = AutoencoderKL(
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
            up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )

    @classmethod
    def from_diffusers(cls, autoencoder: AutoencoderKL, frame_batch: int = 8) -> "SDVAE":
        """Wrap a loaded AutoencoderKL without copying its weights; its scaling rule is kept.

        A shift_factor s with scaling factor f becomes latents_mean = s, latents_std = 1 / f.
        """
        # The settings of the loaded network, and how its latents are scaled.
        source = autoencoder.config
        config = {key: source[key] for key in _COPIED}
        config["scaling_factor"] = source["scaling_factor"]
        for key in ("latents_mean", "latents_std"):
            config[key] = source.get(key)
        if source.get("shift_factor") is not None and config["latents_mean"] is None:
            config["latents_mean"] = [source["shift_factor"]] * source["latent_channels"]
            config["latents_std"] = [1.0 / source["scaling_factor"]] * source["latent_channels"]
        # A model without weights, whose network is replaced by the loaded one.
        with torch.device("meta"):
            model = cls(**config, frame_batch=frame_batch)
        model.autoencoder = autoencoder
        return model.train(autoencoder.training)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True):
        """Encode x (B, 3, T, H, W) in [-1, 1] to a posterior over (B, C, T, H/8, W/8)."""
        self.check_video(x)
        return posterior_output(map_frames(self.autoencoder._encode, x, self.config.frame_batch), return_dict)

    @apply_forward_hook
    def decode(self, z: Tensor, num_frames: int | None = None, return_dict: bool = True):
        """Decode z (B, C, T, h, w) to DecoderOutput of (B, 3, T, 8h, 8w)."""
        self.check_latents(z, num_frames)
        decode = self.autoencoder._decode
        return decoder_output(
            map_frames(lambda part: decode(part).sample, z, self.config.frame_batch), return_dict
        )
