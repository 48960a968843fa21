"""Latte, the denoiser of stage two: a video diffusion transformer, its diffusion loss and its sampler.

Every tensor is (B, C, t, h, w): latents of a video VAE, channels on axis 1. Names load on first use:
importing the package costs nothing, importing `Latte` costs torch and diffusers.
"""

from importlib import import_module

_HOME = {"Latte": "latte", "LATTE_SIZES": "latte"}

__all__ = ["LATTE_SIZES", "Latte"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'denoiser' has no attribute {name!r}")
    return getattr(import_module(f"denoiser.{_HOME[name]}"), name)
