"""Official files of the baselines -> our models: renamed, sized from their shapes, checked strictly.

Every converter raises ValueError that lists the missing, extra and wrongly shaped keys.
"""

import re
from pathlib import Path

from diffusers import AutoencoderKL
from torch import Tensor, nn

from vae.baselines.cvvae import CVVAE
from vae.baselines.ops import OPSVAE
from vae.baselines.tats import TATSVQGAN
from vae.baselines.vqgan import GumbelVQGAN
from vae.reading import Release, load_strict, read_release

_PARTS = (
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"^quantize\.embed\.", "quantize.embedding."),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def compvis_to_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Translate names of taming's and CompVis' 2D autoencoders to diffusers'; 1x1 attention kernels become matrices.

    Attention at levels (taming) is renamed too, which diffusers' own checkpoint converter leaves out.
    """
    renamed = {}
    for key, value in state.items():
        # Levels: diffusers counts up blocks from the deepest.
        key = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", key)
        key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)
        for pattern, replacement in _PARTS:
            key = re.sub(pattern, replacement, key)
        # Attention: other names inside, and matrices for 1 x 1 kernels.
        inner = re.match(r"(.*\.attentions\.\d+\.)(\w+)(\..*)", key)
        if inner and inner[2] in _ATTENTION:
            key = inner[1] + _ATTENTION[inner[2]] + inner[3]
            value = value[:, :, 0, 0].contiguous() if value.ndim == 4 else value
        renamed[key] = value
    return renamed


def _image_sizes(release: Release) -> dict:
    levels = release.count(r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": release.shape("encoder.conv_in.weight")[1],
        "out_channels": release.shape("decoder.conv_out.weight")[0],
        "block_out_channels": tuple(release.widths("encoder.down.%d.block.0.conv1.weight", levels)),
        "layers_per_block": release.count(r"encoder\.down\.0\.block\.(\d+)\."),
    }


def convert_sd_vae(release: Release) -> AutoencoderKL:
    """Convert CompVis SD-VAE (vae-ft-mse-840000-ema-pruned.ckpt) or a whole SD checkpoint to diffusers' AutoencoderKL."""
    if any(key.startswith("encoder.down_blocks.") for key in release.state):
        raise ValueError(
            f"{release.source}: already has diffusers' names; load_vae opens its folder as it is"
        )
    # The VAE alone, without what its training stored beside it.
    prefix = "first_stage_model."
    if any(key.startswith(prefix) for key in release.state):
        release.keep((prefix,), ())
        release.state = {key.removeprefix(prefix): value for key, value in release.state.items()}
    release.keep((), ("loss.", "model_ema."))
    sizes, latent_channels = _image_sizes(release), release.shape("post_quant_conv.weight")[1]
    levels = len(sizes["block_out_channels"])

    def build() -> AutoencoderKL:
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        return AutoencoderKL(latent_channels=latent_channels, scaling_factor=0.18215, **blocks, **sizes)

    return load_strict(build, release, compvis_to_diffusers(release.state, levels))


def convert_vqgan(release: Release) -> GumbelVQGAN:
    """Convert taming's vqgan_gumbel_f8 (Lightning checkpoint) to GumbelVQGAN."""
    release.keep((), ("loss.",))
    codes, channels = release.shape("quantize.embed.weight")
    sizes = _image_sizes(release) | {
        "latent_channels": channels,
        "z_channels": release.shape("post_quant_conv.weight")[0],
        "num_codes": codes,
    }
    state = compvis_to_diffusers(release.state, len(sizes["block_out_channels"]))
    return load_strict(lambda: GumbelVQGAN(**sizes), release, state)


def convert_tats(release: Release) -> TATSVQGAN:
    """Convert TATS' Lightning checkpoint to TATSVQGAN; its discriminators and LPIPS are left behind.

    The factor in time leaves no trace in the shapes: it comes from the stored training arguments, else it is 4.
    """
    if release.arguments.get("padding_type", "replicate") != "replicate":
        raise ValueError(
            f"{release.source}: padding_type={release.arguments['padding_type']!r}, TATSVQGAN pads with 'replicate'"
        )
    release.keep((), ("image_discriminator.", "video_discriminator.", "perceptual_model."))
    space = 2 ** release.count(r"encoder\.conv_blocks\.(\d+)\.")
    codes, channels = release.shape("codebook.embeddings")
    config = {
        "in_channels": release.shape("encoder.conv_first.conv.weight")[1],
        "out_channels": release.shape("decoder.conv_last.conv.weight")[0],
        "latent_channels": channels,
        "num_codes": codes,
        "hidden_channels": release.shape("encoder.conv_first.conv.weight")[0],
        "downsample": tuple(release.arguments.get("downsample") or (min(4, space), space, space)),
        "norm_type": "batch" if "encoder.final_block.0.running_mean" in release.state else "group",
    }
    return load_strict(lambda: TATSVQGAN(**config), release, release.state)


# What the class computes cannot be chosen: a config.json that says otherwise is of another model.
_CVVAE_FIXED = {"use_3d_conv": True, "half_3d": True, "causal_encoder": True, "causal_decoder": False}


def convert_cvvae(release: Release) -> CVVAE:
    """Convert CV-VAE's vae3d or vae3d_v1-1 folder (config.json + weights) to CVVAE."""
    for key, value in _CVVAE_FIXED.items():
        if release.config.get(key, value) != value:
            raise ValueError(
                f"{release.source}: config.json has {key}={release.config[key]}, CVVAE is {key}={value}"
            )
    # Sizes from the shapes; how it encodes, which leaves no trace in them, from config.json.
    config = _image_sizes(release) | {"latent_channels": release.shape("decoder.conv_in.weight")[1]}
    names = {"en_de_n_frames_a_time": "frames_at_a_time"}
    for key in ("scaling_factor", "en_de_n_frames_a_time", "tile_spatial_size", "tile_overlap_ratio"):
        if key in release.config:
            config[names.get(key, key)] = release.config[key]
    return load_strict(lambda: CVVAE(**config), release, release.state)


def convert_ops(release: Release) -> OPSVAE:
    """Convert Open-Sora v1.2's VAE (both stages in one file) to OPSVAE; its shift and scale become the latent statistics."""
    # Levels and widths of both stages.
    spatial, temporal = "spatial_vae.module.encoder", "temporal_vae.encoder"
    levels = release.count(rf"{temporal}\.block_res_blocks\.(\d+)\.")
    widths = release.widths(f"{temporal}.block_res_blocks.%d.0.conv1.conv.weight", levels)
    spatial_levels = release.count(rf"{spatial}\.down_blocks\.(\d+)\.")
    # Statistics of the latents, one value or one per channel.
    channels = release.shape("temporal_vae.post_quant_conv.conv.weight")[0]
    statistics = {}
    for key, name in (("shift", "latents_mean"), ("scale", "latents_std")):
        release.shape(key)
        statistics[name] = release.state[key].double().flatten().expand(channels).tolist()
    config = {
        "in_channels": release.shape(f"{spatial}.conv_in.weight")[1],
        "out_channels": release.shape("spatial_vae.module.decoder.conv_out.weight")[0],
        "latent_channels": channels,
        "spatial_block_out_channels": tuple(
            release.widths(f"{spatial}.down_blocks.%d.resnets.0.conv1.weight", spatial_levels)
        ),
        "spatial_layers_per_block": release.count(rf"{spatial}\.down_blocks\.0\.resnets\.(\d+)\."),
        "filters": widths[0] if widths else release.shape(f"{temporal}.conv_in.conv.weight")[0],
        "channel_multipliers": tuple(width // widths[0] for width in widths),
        "num_res_blocks": release.count(rf"{temporal}\.res_blocks\.(\d+)\."),
        "temporal_downsample": tuple(
            f"{temporal}.conv_blocks.{i}.conv.weight" in release.state for i in range(levels - 1)
        ),
    }
    state = {key: value for key, value in release.state.items() if key not in ("shift", "scale")}
    return load_strict(lambda: OPSVAE(**config, **statistics), release, state)


CONVERTERS = {
    "sd-vae": convert_sd_vae,
    "vqgan": convert_vqgan,
    "tats": convert_tats,
    "cvvae": convert_cvvae,
    "ops": convert_ops,
}


def convert_baseline(family: str, source: str | Path) -> nn.Module:
    """Convert an official file or folder to a model in eval mode. family: a key of CONVERTERS."""
    if family not in CONVERTERS:
        raise ValueError(f"family {family!r}: must be one of {', '.join(CONVERTERS)}")
    return CONVERTERS[family](read_release(source))
