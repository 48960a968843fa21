"""Video VAEs: OD-VAE and the six VAEs that the paper compares it with. Importing `vae` imports no torch.

from vae import load_vae
vae = load_vae("checkpoints/odvae")            # folder: class chosen by its config.json
z = vae.encode(x).latent_dist.mode()           # x (B, 3, T, H, W) in [-1, 1]
x = vae.decode(z).sample

from vae import decode_video, encode_video
video = encode_video(vae, frames)              # uint8 (T, H, W, 3) of any length and size, see vae/clips.py
frames = decode_video(vae, video)
"""

from importlib import import_module

from vae.registry import FAMILIES, build_like, build_vae, describe_vaes, list_vaes, load_vae

_LAZY = {row.cls: row.module for row in FAMILIES.values()} | {
    "encode_video": "clips",
    "decode_video": "clips",
    "VideoLatents": "clips",
    "VideoVAE": "interface",
    "VideoGaussian": "interface",
}
__all__ = ["build_like", "build_vae", "describe_vaes", "list_vaes", "load_vae", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
