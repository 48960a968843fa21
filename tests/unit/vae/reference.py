"""OD-VAE's exact design written plainly, layer by layer over the whole clip: what the fast path must equal.

No steps, no phases, no fused or in-place operations; weights are taken from an ODVAE (variants 1 to 4, norm_scope
"frame", nearest upsampling).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        frames = [F.conv2d(f, layer.weight, layer.bias, layer.stride, layer.padding) for f in x.unbind(2)]
        return torch.stack(frames, 2)
    layer = layer.conv
    x = torch.cat([x[:, :, :1]] * (layer.kernel_size[0] - 1) + [x], 2)
    return F.conv3d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    y = x.transpose(1, 2).flatten(0, 1)
    y = F.group_norm(y, layer.num_groups, layer.weight, layer.bias, layer.eps)
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def act(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def block(layer: nn.Module, x: Tensor) -> Tensor:
    h = conv(layer.conv1, act(norm(layer.norm1, x)))
    h = conv(layer.conv2, act(norm(layer.norm2, h)))
    return (x if layer.nin_shortcut is None else conv(layer.nin_shortcut, x)) + h


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    y = norm(layer.norm, x)
    q, k, v = (conv(m, y).transpose(1, 2).flatten(3) for m in (layer.q, layer.k, layer.v))  # B t C N
    weights = torch.softmax(q.transpose(2, 3) @ k * x.shape[1] ** -0.5, dim=-1)
    y = (v @ weights.transpose(2, 3)).unflatten(3, x.shape[3:]).transpose(1, 2)
    return x + conv(layer.proj_out, y)


def middle(layer: nn.Module, x: Tensor) -> Tensor:
    return block(layer.block_2, attention(layer.attn_1, block(layer.block_1, x)))


def encode(model: nn.Module, x: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> moments (B, 2C, t, h, w)."""
    encoder = model.encoder
    x = conv(encoder.conv_in, x)
    for level in encoder.down:
        for layer in level.block:
            x = block(layer, x)
        if hasattr(level, "downsample"):
            x = conv(level.downsample.conv, F.pad(x, (0, 1, 0, 1)))
    x = conv(encoder.conv_out, act(norm(encoder.norm_out, middle(encoder.mid, x))))
    return conv(model.quant_conv, x)


def decode(model: nn.Module, z: Tensor) -> Tensor:
    """(B, C, t, h, w) -> (B, 3, T, H, W)."""
    decoder = model.decoder
    x = middle(decoder.mid, conv(decoder.conv_in, conv(model.post_quant_conv, z)))
    for level in reversed(decoder.up):
        for layer in level.block:
            x = block(layer, x)
        if hasattr(level, "upsample"):
            if hasattr(level.upsample, "temporal"):
                x = torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(2, dim=2)), 2)
            x = conv(level.upsample.conv, F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))
    return conv(decoder.conv_out, act(norm(decoder.norm_out, x)))
