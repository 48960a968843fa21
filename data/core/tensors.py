"""Pixels as numbers and back; tensors of other files and other models, compared strictly before they are taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from data.core.lazy import lazy

torch = lazy("torch")

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def some(names: Iterable[str], most: int = 20) -> str:
    """List the first of the names, sorted, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differences(wanted: Mapping[str, Any], given: Mapping[str, Any], optional: Iterable[str] = ()) -> str:
    """Say what keeps a state dict from being loaded: "" or counts and names of missing tensors, extra ones, and wrong shapes.

    optional: keys of `wanted` that may be missing.
    """
    shapes = []
    for key in wanted.keys() & given.keys():
        own, other = tuple(wanted[key].shape), tuple(given[key].shape)
        if own != other:
            shapes.append(f"{key} {other} instead of {own}")
    kinds = {
        "missing": wanted.keys() - given.keys() - set(optional),
        "extra": given.keys() - wanted.keys(),
        "wrong shapes": shapes,
    }
    return "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names)


def to_float(clip: np.ndarray | Tensor) -> Tensor:
    """Turn uint8 (..., T, H, W, 3) into float32 (..., 3, T, H, W) in [-1, 1]: x / 127.5 - 1, where the clip is (on the GPU)."""
    clip = torch.as_tensor(clip)
    if clip.dtype != torch.uint8 or clip.ndim < 4 or clip.shape[-1] != 3:
        raise ValueError(f"clip {clip.dtype} {tuple(clip.shape)}: need uint8 (..., T, H, W, 3)")
    # a number would be a product with 1 / 127.5 on a GPU; filled there, so that nobody waits for a copy
    divisor = torch.full((), 127.5, device=clip.device)
    video = clip.movedim(-1, -4).to(torch.float32, memory_format=torch.contiguous_format)
    return video.div_(divisor).sub_(1.0)


def to_uint8(video: Tensor) -> np.ndarray:
    """Turn a float video (..., 3, T, H, W) in [-1, 1] into uint8 (..., T, H, W, 3): clamp, then round half to even.

    The inverse of `to_float` on all 256 levels. Raises ValueError on NaN.
    """
    if video.ndim < 4 or video.shape[-4] != 3:
        raise ValueError(f"video {tuple(video.shape)}: need (..., 3, T, H, W)")
    video = video.detach().float()
    if video.isnan().any():
        raise ValueError("video holds NaN: no pixel has that value; look for the step that made it")
    pixels = ((video.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte()
    return pixels.movedim(-4, -1).contiguous().cpu().numpy()
