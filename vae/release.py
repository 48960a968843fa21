"""Open-Sora-Plan's released VAEs (v1.0, v1.1, v1.2) <-> ODVAE. Tensor names are shared; the config is translated.

The config must be read: weights of one release do not fit another's default (Open-Sora-Plan issue 346).
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vae.odvae import ODVAE
from vae.reading import Release, find_file, load_strict, read_checkpoint, read_config
from vae.variants import LAYOUTS, RELEASED, Layout

_BLOCK = {"2d": "ResnetBlock2D", "3d": "ResnetBlock3D", "23d": "ResnetBlock23D"}
_CONV = {"2d": "Conv2d", "3d": "CausalConv3d"}
_DOWN = {
    None: "",
    "2d": "Downsample",
    "1x3x3": "SpatialDownsample2x",
    "st": "Spatial2xTime2x3DDownsample",
}
_UP = {None: "", "2d": "Upsample", "1x3x3": "SpatialUpsample2x", "st": "Spatial2xTime2x3DUpsample"}
_TIME_DOWN = {None: "", "pool": "TimeDownsample2x", "res": "TimeDownsampleRes2x"}
_TIME_UP = {None: "", "pool": "TimeUpsample2x", "res": "TimeUpsampleRes2x"}
_SIZES = ("hidden_size", "hidden_size_mult", "num_res_blocks", "z_channels", "embed_dim")
# What a release may only have one value of, because ODVAE has no switch for it.
_FIXED = {
    "attn_resolutions": [],
    "dropout": 0.0,
    "double_z": True,
    "q_conv": "CausalConv3d",
    "use_quant_layer": True,
}


def layout_fields(layout: Layout) -> dict[str, str | list[str]]:
    """Write a layout in the words of Open-Sora-Plan's config.json."""
    attention = "AttnBlock3D" if layout.scrambled_attention else "AttnBlock3DFix"
    return {
        "encoder_conv_in": _CONV[layout.conv_in],
        "encoder_conv_out": "CausalConv3d",
        "encoder_attention": attention,
        "encoder_resnet_blocks": [_BLOCK[kind] for kind in layout.encoder_blocks],
        "encoder_spatial_downsample": [_DOWN[kind] for kind in layout.down],
        "encoder_temporal_downsample": [_TIME_DOWN[kind] for kind in layout.time_down],
        "encoder_mid_resnet": _BLOCK[layout.mid],
        "decoder_conv_in": "CausalConv3d",
        "decoder_conv_out": _CONV[layout.conv_out],
        "decoder_attention": attention,
        "decoder_resnet_blocks": [_BLOCK[kind] for kind in layout.decoder_blocks],
        "decoder_spatial_upsample": [_UP[kind] for kind in layout.up],
        "decoder_temporal_upsample": [_TIME_UP[kind] for kind in layout.time_up],
        "decoder_mid_resnet": _BLOCK[layout.mid],
    }


def config_from_upstream(upstream: dict) -> dict:
    """Translate Open-Sora-Plan's config.json into arguments of ODVAE. Raises ValueError for what ODVAE cannot be.

    Upstream's blocks take statistics over the clip and interpolate trilinearly, so those settings follow.
    """
    # All that is needed is there, and nothing has a value that ODVAE cannot have.
    wanted = (*_SIZES[:-1], *layout_fields(LAYOUTS[4]))
    missing = [key for key in wanted if key not in upstream]
    if missing:
        raise ValueError(f"config.json is not an Open-Sora-Plan VAE's: {', '.join(missing)} missing")
    for key, value in _FIXED.items():
        if upstream.get(key, value) != value:
            raise ValueError(f"config.json: {key}={upstream[key]!r}; ODVAE can only be {value!r}")
    if upstream.get("embed_dim", upstream["z_channels"]) != upstream["z_channels"]:
        raise ValueError(
            f"config.json: embed_dim={upstream['embed_dim']} differs from z_channels={upstream['z_channels']}"
        )
    # The layout whose fields are all as the file has them; the nearest one makes the message.
    differing = {}
    for variant, layout in LAYOUTS.items():
        fields = layout_fields(layout)
        differing[variant] = [key for key, value in fields.items() if upstream[key] != value]
    variant = min(differing, key=lambda name: len(differing[name]))
    if differing[variant]:
        found = ", ".join(f"{key}={upstream[key]}" for key in differing[variant])
        raise ValueError(
            f"config.json fits no known layout; nearest is variant {variant!r}, apart from {found}"
        )
    # Sizes, and how the released models norm and upsample.
    width = upstream["hidden_size"]
    return {
        "variant": variant,
        "block_out_channels": tuple(width * m for m in upstream["hidden_size_mult"]),
        "layers_per_block": upstream["num_res_blocks"],
        "latent_channels": upstream["z_channels"],
        **RELEASED,
    }


def config_to_upstream(model: ODVAE) -> dict:
    """Write ODVAE's config in upstream's words. Raises ValueError if upstream's code would compute something else."""
    config = model.config
    other = [f"{key}={config[key]!r}" for key, value in RELEASED.items() if config[key] != value]
    if other:
        raise ValueError(
            f"{', '.join(other)}: Open-Sora-Plan's code has no such setting and would decode other pixels; "
            "only models built as preset osp_v1_0, osp_v1_1 or osp_v1_2 can be exported"
        )
    # Upstream has no words for other widths, channels and groups.
    widths = config.block_out_channels
    sizes = (config.in_channels, config.out_channels, config.norm_num_groups)
    if any(w % widths[0] for w in widths) or sizes != (3, 3, 32):
        raise ValueError(
            "Open-Sora-Plan needs widths that are multiples of the first, 3 channels in and out, 32 groups"
        )
    return {
        "_class_name": "CausalVAEModel",
        "hidden_size": widths[0],
        "hidden_size_mult": [w // widths[0] for w in widths],
        "num_res_blocks": config.layers_per_block,
        "z_channels": config.latent_channels,
        "embed_dim": config.latent_channels,
        "resolution": 256,
        **_FIXED,
        **layout_fields(LAYOUTS[config.variant]),
    }


def vae_tensors(checkpoint: dict) -> dict[str, Tensor]:
    """Choose the VAE's tensors in a checkpoint: flat, or under state_dict, gen_model or ema_state_dict (preferred).

    The `module.` prefix goes, and so does what a training run stores beside the VAE (`loss.*`: LPIPS and
    discriminator).
    """
    tensors = checkpoint
    for name in ("ema_state_dict", "state_dict", "gen_model"):
        if isinstance(tensors.get(name), dict) and tensors[name]:
            tensors = tensors[name]
    chosen = {}
    for key, value in tensors.items():
        key = key.removeprefix("module.")
        if isinstance(value, Tensor) and not key.startswith("loss."):
            chosen[key] = value
    return chosen


def from_release(source: str | Path) -> ODVAE:
    """Load a released VAE, in eval mode. source: a folder with config.json and one weight file, or that file.

    Raises ValueError listing missing, extra and wrongly shaped tensors, or the field of config.json that does not fit.
    """
    file = find_file(Path(source))
    upstream = read_config(file)
    if not upstream:
        raise ValueError(
            f"{file.parent / 'config.json'}: missing; Open-Sora-Plan's config.json must stand beside the weights"
        )
    config = config_from_upstream(upstream)
    tensors = vae_tensors(read_checkpoint(file))
    return load_strict(lambda: ODVAE(**config), Release(str(file), tensors), tensors)


def save_release(model: ODVAE, folder: str | Path) -> None:
    """Write the model as Open-Sora-Plan does: config.json in its words and diffusion_pytorch_model.safetensors."""
    folder = Path(folder)
    config = config_to_upstream(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
