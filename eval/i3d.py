"""I3D (RGB, Kinetics-400): the network of FVD and KVD, with the key names of its public PyTorch weights.

Inception-v1 inflated to three dimensions (Carreira and Zisserman, 2017, "Quo Vadis, Action Recognition?").
The features are the 400 logits, averaged over time. TF-Hub's original has batch-norm epsilon 1e-3; the line
VideoGPT, TATS, cd-fvd runs the same weights with 1e-5. That changes the logits by 0.16 % and FVD by 0.23 %
(docs/metrics.md), so the protocol states it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.protocol import MIN_FRAMES

RESOLUTION = 224
EPS_TATS, EPS_TF = 1e-5, 1e-3

# Output channels of an Inception block: 1x1 | 1x1 -> 3x3x3 | 1x1 -> 3x3x3 | pool -> 1x1
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Max-pools by the layer they follow: name, kernel, stride (time, height, width)
POOLS = {
    "Conv3d_1a_7x7": ("MaxPool3d_2a_3x3", (1, 3, 3), (1, 2, 2)),
    "Conv3d_2c_3x3": ("MaxPool3d_3a_3x3", (1, 3, 3), (1, 2, 2)),
    "Mixed_3c": ("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2)),
    "Mixed_4f": ("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2)),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Compute TensorFlow's "SAME" padding of one axis: (front, back), the odd one goes to the back."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Zero-pad the last three axes of x by the "SAME" rule."""
    pads = [same_padding(n, k, s) for n, k, s in zip(x.shape[-3:], kernel, stride, strict=True)]
    flat = [p for pair in reversed(pads) for p in pair]
    return F.pad(x, flat) if any(flat) else x


def max_pool_same(x: Tensor, kernel, stride) -> Tensor:
    """Max-pool with "SAME" zero padding; zeros are harmless because the input comes from a ReLU."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


class Unit3D(nn.Module):
    """Convolution without bias, batch norm, ReLU; "SAME" padding."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, eps: float = EPS_TATS
    ):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        # (B, in, T, H, W) -> (B, out, T / s, H / s, W / s), rounded up
        return F.relu(self.bn(self.conv3d(x)))


class Mixed(nn.Module):
    """Inception block: four branches, concatenated in channels."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], eps: float):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit3D(in_channels, b0, eps=eps)
        self.b1a = Unit3D(in_channels, b1a, eps=eps)
        self.b1b = Unit3D(b1a, b1b, kernel=3, eps=eps)
        self.b2a = Unit3D(in_channels, b2a, eps=eps)
        self.b2b = Unit3D(b2a, b2b, kernel=3, eps=eps)
        self.b3b = Unit3D(in_channels, b3b, eps=eps)
        self.out_channels = b0 + b1b + b2b + b3b

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class Logits(nn.Module):
    """The last 1x1x1 convolution, under the name it has in the weight files."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """I3D with 400 logits. 12,697,264 parameters, 344 entries in the state dict.

    eps: epsilon of all batch norms, 1e-5 (TATS) or 1e-3 (TF-Hub).
    """

    def __init__(self, eps: float = EPS_TATS):
        super().__init__()
        self.eps = eps
        # Stem: half the frames and, with the pools that POOLS puts between, 224 -> 28 pixels.
        self.Conv3d_1a_7x7 = Unit3D(3, 64, kernel=7, stride=2, eps=eps)
        self.Conv3d_2b_1x1 = Unit3D(64, 64, eps=eps)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, kernel=3, eps=eps)
        # Nine Inception blocks: 192 channels at 28 x 28 to 1,024 at 7 x 7.
        channels = 192
        for name, widths in MIXED.items():
            block = Mixed(channels, widths, eps)
            self.add_module(name, block)
            channels = block.out_channels
        self.logits = Logits(channels, 400)

    def endpoints(self, x: Tensor):
        """Yield (name, activation) of each layer up to Mixed_5c, in order."""
        check_input(x)
        for name, layer in self.named_children():
            if name == "logits":
                return
            x = layer(x)
            yield name, x
            if name in POOLS:
                pool, kernel, stride = POOLS[name]
                x = max_pool_same(x, kernel, stride)
                yield pool, x

    def forward(self, x: Tensor) -> Tensor:
        """Classify x (B, 3, T, 224, 224) float in [-1, 1], T >= 9. Returns logits (B, 400), the mean over time.

        Raises ValueError for another shape or fewer frames.
        """
        for _, features in self.endpoints(x):  # noqa: B007 - the last one counts
            pass
        return head(self.logits, features)


def head(logits: nn.Module, features: Tensor) -> Tensor:
    """Average pool (2, 7, 7), logits, mean over remaining time positions: (B, 1024, t, 7, 7) -> (B, 400)."""
    pooled = F.avg_pool3d(features, (2, 7, 7), stride=1)
    return logits(pooled).flatten(3).squeeze(3).mean(dim=2)


def check_input(x: Tensor) -> None:
    """Raise ValueError unless x is (B, 3, T >= 9, 224, 224); at 256 pixels it would run and be wrong."""
    if x.ndim != 5 or x.shape[1] != 3 or tuple(x.shape[3:]) != (RESOLUTION, RESOLUTION):
        raise ValueError(f"I3D got {tuple(x.shape)}: it needs (B, 3, T, 224, 224), see to_i3d_input")
    if x.shape[2] < MIN_FRAMES:
        raise ValueError(f"T={x.shape[2]}: I3D needs T >= {MIN_FRAMES} frames, e.g. --num-frames 16")


def to_i3d_input(clip: Tensor, resize: str = "squash") -> Tensor:
    """Bring one clip to the network's size and range.

    clip: (T, H, W, 3) uint8 on any device. Returns (3, T, 224, 224) float32 in [-1, 1], a view of memory in
    (T, H, W, C) order. resize: "squash" makes both sides 224 (TATS); "short" makes the short side 224 and
    crops the centre (VideoGPT, common_metrics). Bilinear with half-pixel centres, no antialiasing.
    """
    _, H, W, _ = clip.shape
    frames = clip.float().permute(0, 3, 1, 2)  # (T, 3, H, W), still channels last in memory
    # The size to scale to: 224 x 224, or 224 for the short side.
    if resize == "squash":
        target = (RESOLUTION, RESOLUTION)
    elif resize == "short":
        scale = RESOLUTION / min(H, W)
        target = (RESOLUTION, math.ceil(W * scale)) if H < W else (math.ceil(H * scale), RESOLUTION)
    else:
        raise ValueError(f"resize={resize!r}: one of squash, short")
    if (H, W) != target:
        frames = F.interpolate(frames, size=target, mode="bilinear", align_corners=False)
    # The centre, and the range [-1, 1].
    top, left = (target[0] - RESOLUTION) // 2, (target[1] - RESOLUTION) // 2
    frames = frames[:, :, top : top + RESOLUTION, left : left + RESOLUTION]
    return frames.div(127.5).sub_(1.0).permute(1, 0, 2, 3)  # a product with 2 / 255 would be biased by 6e-8
