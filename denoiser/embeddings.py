"""What Latte adds to its tokens: patches, fixed sin-cos positions, the timestep, the class label.

Module and parameter names are those of the Latte release (Vchitect/Latte, models/latte.py), so that its
checkpoints load without a key map.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
    """Make the (N, dim) float64 table [sin(p w_i) | cos(p w_i)] of (N,) positions, w_i = 10000^(-i / (dim / 2)).

    Raises ValueError for an odd dim. Also the temporal table of Latte, with positions 0 .. t - 1.
    """
    if dim % 2:
        raise ValueError(f"dim={dim}: a sin-cos table needs an even dim")
    omega = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2))
    angles = np.outer(np.asarray(positions, dtype=np.float64), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(height: int, width: int, dim: int) -> np.ndarray:
    """Make the (height * width, dim) float64 table of a patch grid, row-major; the first dim / 2 encode the COLUMN.

    The order (column, then row) is that of the released weights; swapped halves give a different model.
    Raises ValueError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim={dim}: a 2-D sin-cos table needs a multiple of 4")
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.concatenate([sincos_1d(columns, dim // 2), sincos_1d(rows, dim // 2)], axis=1)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed (B,) timesteps as (B, dim) float32 [cos(t f_i) | sin(t f_i)], f_i = 10000^(-i / (dim // 2)).

    Note the order, the reverse of the position tables. An odd dim ends in a zero column. Always float32: in
    bf16 the ids 257 and 258 are one number.
    """
    half = dim // 2
    # In upstream's order of operations: one float32 rounding of a frequency is 6e-5 of an angle at t = 999.
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * exponents.exp()
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class PatchProjection(nn.Conv2d):
    """A convolution with kernel = stride = patch_size, computed as one matrix product that yields tokens.

    Its weight (D, C, p, p) is laid out as a convolution's, as in the release.
    """

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Cut into tokens: (B, C, t, h, w) -> (B, t, N, D), N = (h / p)(w / p) tokens of a frame, row-major."""
        B, C, t, h, w = x.shape
        p = self.kernel_size[0]
        # (B, t, h / p, w / p, C, p, p): the values of a patch in the order of the kernel's
        patches = x.reshape(B, C, t, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 4, 6)
        return F.linear(
            patches.reshape(B, t, (h // p) * (w // p), C * p * p), self.weight.flatten(1), self.bias
        )


class PatchEmbed(nn.Module):
    """Uniform frame patch embedding (Latte): each latent frame is cut on its own."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = PatchProjection(in_channels, hidden_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Cut latents into tokens: (B, C, t, h, w) -> (B, t, N, D)."""
        return self.proj(x)


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 dims, then Linear, SiLU, Linear."""

    num_frequencies = 256

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed (B,) timesteps: (B, D) in the dtype of the weights."""
        return self.mlp(timestep_embedding(t, self.num_frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class vectors; its last row, id num_classes, is the null class of classifier-free guidance.

    With dropout_prob 0 there is no null row (and no guidance).
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor, force_drop: Tensor | None = None) -> Tensor:
        """Embed (B,) int64 labels: (B, D). Training replaces each label by the null id with dropout_prob.

        force_drop: (B,) bool replaces that draw, in any mode: True = null.
        """
        # One draw per sample, for classifier-free guidance.
        if force_drop is None and self.training and self.dropout_prob > 0:
            force_drop = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
        if force_drop is not None:
            y = torch.where(force_drop.to(y.device), self.num_classes, y)
        return self.embedding_table(y)
