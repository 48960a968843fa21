"""Temporal tiling (paper 3.3) and spatial tiling; each takes the function to apply to the tiles.

Both are approximations: a group cannot see the frames before its first one. Streaming (vae/odvae.py) is exact;
tiling is what the paper measures (Table 4), and serves the layouts that cannot be streamed.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def temporal_groups(length: int, size: int) -> list[tuple[int, int]]:
    """Groups [start, stop) of `size` frames that share one frame with their neighbour; the last may be shorter.

    `temporal_groups(97, 33)` -> [(0, 33), (32, 65), (64, 97)]. A length up to `size` gives one group.
    """
    starts = range(0, max(length - 1, 1), size - 1)
    return [(start, min(start + size, length)) for start in starts]


def over_groups(fn: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """Apply fn to groups of `size` frames of x (B, C, T, H, W) and join: later groups lose their first output.

    The first frame of a later group repeats the last frame of the group before, so its output stands twice.
    """
    parts = [fn(x[:, :, start:stop]) for start, stop in temporal_groups(x.shape[2], size)]
    return torch.cat([part if i == 0 else part[:, :, 1:] for i, part in enumerate(parts)], dim=2)


def tile_starts(length: int, size: int, step: int) -> list[int]:
    """Where tiles begin, every `step`; none begins once a tile has reached the end."""
    return list(range(0, max(length - size, 0) + step, step)) if length > size else [0]


def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Ramp linearly from the end of `before` to the start of `after` over up to `extent` positions of dim."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    if extent == 0:
        return after
    shape = [1] * after.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=after.device, dtype=after.dtype) / extent).view(shape)
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new = after.narrow(dim, 0, extent)
    mixed = old * (1 - ramp) + new * ramp
    return torch.cat((mixed, after.narrow(dim, extent, after.shape[dim] - extent)), dim)


def over_tiles(
    fn: Callable[[Tensor], Tensor], x: Tensor, size: int, step: int, out_size: int, out_step: int
) -> Tensor:
    """Apply fn to overlapping square tiles of x (..., H, W), blend the overlaps and join.

    size, step: tile side and distance in x; out_size, out_step: the same in fn's output.
    Each tile is blended with its upper, then with its left neighbour, then cropped to out_step.
    """
    rows, columns = (tile_starts(n, size, step) for n in x.shape[-2:])
    overlap, above, joined = out_size - out_step, None, []
    for i, top in enumerate(rows):
        tiles = []
        for j, left in enumerate(columns):
            tile = fn(x[..., top : top + size, left : left + size])
            if above is not None:
                tile = blend(above[j], tile, overlap, -2)
            if j > 0:
                tile = blend(tiles[j - 1], tile, overlap, -1)
            tiles.append(tile)
        height = None if i == len(rows) - 1 else out_step
        widths = [None if j == len(columns) - 1 else out_step for j in range(len(columns))]
        joined.append(torch.cat([t[..., :height, :n] for t, n in zip(tiles, widths, strict=True)], dim=-1))
        above = tiles
    return torch.cat(joined, dim=-2)
