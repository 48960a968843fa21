"""The same I3D, about twice as fast on a CPU: one set of logits, no second definition of the weights.

Batch norms are folded into the convolutions, the three 1x1 convolutions that read the same input become one,
activations lie in channels-last order, the 3x3x3 max-pools run axis by axis (a maximum is separable), and on a CPU the
3x3x3 convolutions take Winograd's form where it is faster (data/core/winograd.py).
The fold is computed in float64, so the logits differ from I3D's by float32 rounding only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.core import convolution, winograd
from eval.i3d import I3D, MIXED, POOLS, Unit3D, check_input, head, pad_same, same_padding


def _fold(*units: Unit3D) -> nn.Conv3d:
    """Make one convolution with bias of units that share their input: batch norms folded, outputs stacked."""
    # bn(w x) = (s w) x + (bias - mean s), with s = weight / sqrt(var + eps).
    weights, biases = [], []
    for unit in units:
        bn = unit.bn
        scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
        weights.append(unit.conv3d.weight.double() * scale.view(-1, 1, 1, 1, 1))
        biases.append(bn.bias.double() - bn.running_mean.double() * scale)
    weight, bias = torch.cat(weights).float(), torch.cat(biases).float()
    conv = nn.Conv3d(
        weight.shape[1],
        weight.shape[0],
        tuple(weight.shape[2:]),
        units[0].conv3d.stride,
        [size // 2 for size in weight.shape[2:]],  # "SAME" for stride 1
        device=weight.device,
    )
    conv.weight.data, conv.bias.data = weight, bias
    return conv


def _conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Convolve with "SAME" padding, then ReLU in place."""
    if winograd.suits(conv, x, kt=conv.kernel_size[0]):
        return winograd.convolve_3x3(
            conv, F.pad(x, (0, 0, 0, 0, 1, 1)), "", lambda weight: weight, kt=3
        ).relu_()
    pads = [same_padding(*args) for args in zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True)]
    if all(front == back for front, back in pads):
        padding = [front for front, _ in pads]
    else:  # a padded copy
        x, padding = pad_same(x, conv.kernel_size, conv.stride), [0, 0, 0]
    kernel = convolution.prepared(conv, x, stride=conv.stride, padding=padding)
    return convolution.convolve(x, kernel, conv.bias, conv.stride, padding).relu_()


def _pool_time(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Take the maximum over time windows of a non-negative (B, C, T, H, W), "SAME" padding."""
    if kernel == 1:
        return x
    T = x.shape[2]
    front, _ = same_padding(T, kernel, stride)
    frames = []
    for start in range(-front, T - front, stride):
        # The window's frames inside the clip: the padding is zero, and no value is below that.
        first, stop = max(start, 0), min(start + kernel, T)
        out = x[:, :, first]  # (B, C, H, W)
        for t in range(first + 1, stop):
            out = torch.maximum(out, x[:, :, t])
        frames.append(out.permute(0, 2, 3, 1))
    # (B, C, t, H, W), channels last in memory
    return torch.stack(frames, dim=1).permute(0, 4, 1, 2, 3)


def max_pool_separable(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Max-pool as `max_pool_same` does for x >= 0 (after a ReLU): height and width first, then time."""
    # Height and width, frame by frame.
    B, C, T, H, W = x.shape
    frames = x.permute(0, 2, 1, 3, 4).reshape(B * T, C, H, W)
    top, left = same_padding(H, kernel[1], stride[1])[0], same_padding(W, kernel[2], stride[2])[0]
    frames = F.max_pool2d(frames, kernel[1:], stride[1:], (top, left), ceil_mode=True)
    # ceil_mode with the front padding on both sides may add a window that starts beyond the data: cut it
    h, w = -(-H // stride[1]), -(-W // stride[2])
    frames = frames[:, :, :h, :w]
    return _pool_time(frames.reshape(B, T, C, h, w).permute(0, 2, 1, 3, 4), kernel[0], stride[0])


class FastI3D(nn.Module):
    """I3D for inference, made from a loaded I3D. Same input, same logits."""

    def __init__(self, i3d: I3D):
        super().__init__()
        self.stem = nn.ModuleDict()
        for name in ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"):
            self.stem[name] = _fold(getattr(i3d, name))
        self.blocks = nn.ModuleDict()
        for name in MIXED:
            block = getattr(i3d, name)
            # b0, b1a and b2a read the block's input: one convolution.
            self.blocks[name] = nn.ModuleDict(
                {
                    "pointwise": _fold(block.b0, block.b1a, block.b2a),
                    "b1b": _fold(block.b1b),
                    "b2b": _fold(block.b2b),
                    "b3b": _fold(block.b3b),
                }
            )
        self.logits = i3d.logits
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last_3d)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Classify x (B, 3, T, 224, 224) float in [-1, 1], T >= 9. Returns logits (B, 400). Records no gradients."""
        check_input(x)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        # Stem: (B, 3, T, 224, 224) -> (B, 192, ceil(T / 2), 28, 28)
        for name, conv in self.stem.items():
            x = _conv(conv, x)
            x = max_pool_separable(x, *POOLS[name][1:]) if name in POOLS else x
        # Inception blocks: -> (B, 1024, ceil(T / 8), 7, 7)
        for name, block in self.blocks.items():
            b0, b1a, _, b2a, _, _ = MIXED[name]
            direct, left, right = _conv(block["pointwise"], x).split([b0, b1a, b2a], dim=1)
            pooled = max_pool_separable(x, (3, 3, 3), (1, 1, 1))
            branches = [
                direct,
                _conv(block["b1b"], left),
                _conv(block["b2b"], right),
                _conv(block["b3b"], pooled),
            ]
            x = torch.cat(branches, dim=1)
            x = max_pool_separable(x, *POOLS[name][1:]) if name in POOLS else x
        return head(self.logits, x)
