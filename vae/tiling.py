"""Temporal tiling (paper 3.3) and spatial tiling; each takes the function to apply to the tiles.

Both are approximations: a group cannot see the frames before its first one. Streaming (vae/odvae.py) is exact;
tiling is what the paper measures (Table 4), and serves the layouts that cannot be streamed.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def temporal_groups(length: int, size: int) -> list[tuple[int, int]]:
    """Cut into groups [start, stop) of `size` frames that share one frame with their neighbour; the last may be shorter.

    `temporal_groups(97, 33)` -> [(0, 33), (32, 65), (64, 97)]. A length up to `size` gives one group.
    """
    starts = range(0, max(length - 1, 1), size - 1)
    return [(start, min(start + size, length)) for start in starts]


def over_groups(fn: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """Apply fn to groups of `size` frames of x (B, C, T, H, W) and join: later groups lose their first output.

    The first frame of a later group repeats the last frame of the group before, so its output stands twice.
    """
    parts = []
    for start, stop in temporal_groups(x.shape[2], size):
        part = fn(x[:, :, start:stop])
        parts.append(part[:, :, 1:] if parts else part)
    return torch.cat(parts, dim=2)


def tile_starts(length: int, size: int, step: int) -> list[int]:
    """List where tiles begin, every `step`; none begins once a tile has reached the end."""
    return list(range(0, max(length - size, 0) + step, step)) if length > size else [0]


def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Ramp linearly from the end of `before` to the start of `after` over up to `extent` positions of dim."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    if extent == 0:
        return after
    # Weights 0, 1 / extent, ... along dim: the first position is all `before`.
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
    rows, columns = tile_starts(x.shape[-2], size, step), tile_starts(x.shape[-1], size, step)
    overlap, above, joined = out_size - out_step, None, []
    for top in rows:
        # A row of tiles, blended with the row above and from left to right.
        tiles = []
        for left in columns:
            tile = fn(x[..., top : top + size, left : left + size])
            if above is not None:
                tile = blend(above[len(tiles)], tile, overlap, -2)
            if tiles:
                tile = blend(tiles[-1], tile, overlap, -1)
            tiles.append(tile)
        above = tiles
        # Without what the next tile and the next row blend; the last of each is whole.
        kept = [tile[..., :out_step] for tile in tiles[:-1]] + tiles[-1:]
        joined.append(torch.cat(kept, dim=-1)[..., : None if top == rows[-1] else out_step, :])
    return torch.cat(joined, dim=-2)
