"""OD-VAE written plainly, layer by layer over the whole clip: what the fast paths must equal.

No steps, no phases, no fused or in-place operations; weights and config are taken from an ODVAE of any variant and
preset. The released layouts follow Open-Sora-Plan: a residual block norms per frame only if both its convolutions are
2D; every other norm, `norm_out` included, has the config's scope.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def first_and_rest(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :, :1], x[:, :, 1:]


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        frames = [F.conv2d(f, layer.weight, layer.bias, layer.stride, layer.padding) for f in x.unbind(2)]
        return torch.stack(frames, 2)
    layer = layer.conv
    x = torch.cat([x[:, :, :1]] * (layer.kernel_size[0] - 1) + [x], 2)
    return F.conv3d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def norm(layer: nn.GroupNorm, x: Tensor, scope: str) -> Tensor:
    if scope == "clip":
        return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
    y = x.transpose(1, 2).flatten(0, 1)
    y = F.group_norm(y, layer.num_groups, layer.weight, layer.bias, layer.eps)
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def act(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def block(layer: nn.Module, x: Tensor, scope: str) -> Tensor:
    if isinstance(layer.conv1, nn.Conv2d) and isinstance(layer.conv2, nn.Conv2d):
        scope = "frame"
    h = conv(layer.conv1, act(norm(layer.norm1, x, scope)))
    h = conv(layer.conv2, act(norm(layer.norm2, h, scope)))
    return (x if layer.nin_shortcut is None else conv(layer.nin_shortcut, x)) + h


def attention(layer: nn.Module, x: Tensor, scope: str, scrambled: bool) -> Tensor:
    y = norm(layer.norm, x, scope)
    B, C, t, h, w = x.shape
    q, k, v = (conv(m, y) for m in (layer.q, layer.k, layer.v))
    if scrambled:  # (B, C, t) rows read as (B t, C)
        q, k, v = (a.reshape(B, t, C, h * w) for a in (q, k, v))
    else:
        q, k, v = (a.transpose(1, 2).flatten(3) for a in (q, k, v))  # B t C N
    weights = torch.softmax(q.transpose(2, 3) @ k * C**-0.5, dim=-1)
    y = v @ weights.transpose(2, 3)
    y = y.reshape(x.shape) if scrambled else y.unflatten(3, (h, w)).transpose(1, 2)
    return x + conv(layer.proj_out, y)


def middle(layer: nn.Module, x: Tensor, config) -> Tensor:
    x = block(layer.block_1, x, config.norm_scope)
    x = attention(layer.attn_1, x, config.norm_scope, scrambled=config.variant == "osp_v1_0")
    return block(layer.block_2, x, config.norm_scope)


def pool(x: Tensor) -> Tensor:
    return F.avg_pool3d(torch.cat([x[:, :, :1]] * 2 + [x], 2), (3, 1, 1), stride=(2, 1, 1))


def time_down(layer: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(layer, "mix_factor"):
        return pool(x)
    a = torch.sigmoid(layer.mix_factor)
    padded = torch.cat([x[:, :, :1]] * 2 + [x], 2)
    return a * pool(x) + (1 - a) * F.conv3d(padded, layer.conv.weight, layer.conv.bias, (2, 1, 1), (0, 1, 1))


def time_up(layer: nn.Module, x: Tensor) -> Tensor:
    first, rest = first_and_rest(x)
    if rest.shape[2]:
        x = torch.cat((first, F.interpolate(rest, scale_factor=(2, 1, 1), mode="trilinear")), 2)
    if not hasattr(layer, "mix_factor"):
        return x
    a = torch.sigmoid(layer.mix_factor)
    return a * x + (1 - a) * conv(layer.conv, x)


def space_time_up(x: Tensor, config) -> Tensor:
    first, rest = first_and_rest(x)
    if config.temporal_up == "nearest":
        x = torch.cat((first, rest.repeat_interleave(2, dim=2)), 2)
        return F.interpolate(x, scale_factor=(1, 2, 2), mode=config.spatial_up)
    x = F.interpolate(first, scale_factor=(1, 2, 2), mode=config.spatial_up)
    if rest.shape[2]:
        x = torch.cat((x, F.interpolate(rest, scale_factor=(2, 2, 2), mode="trilinear")), 2)
    return x


def encode(model: nn.Module, x: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> moments (B, 2C, t, h, w)."""
    encoder, scope = model.encoder, model.config.norm_scope
    x = conv(encoder.conv_in, x)
    for level in encoder.down:
        for layer in level.block:
            x = block(layer, x, scope)
        if level.downsample is not None:
            x = conv(level.downsample.conv, F.pad(x, (0, 1, 0, 1)))
        if level.time_downsample is not None:
            x = time_down(level.time_downsample, x)
    x = middle(encoder.mid, x, model.config)
    x = conv(encoder.conv_out, act(norm(encoder.norm_out, x, scope)))
    return conv(model.quant_conv, x)


def decode(model: nn.Module, z: Tensor) -> Tensor:
    """(B, C, t, h, w) -> (B, 3, T, H, W)."""
    decoder, scope = model.decoder, model.config.norm_scope
    x = middle(decoder.mid, conv(decoder.conv_in, conv(model.post_quant_conv, z)), model.config)
    for level in reversed(decoder.up):
        for layer in level.block:
            x = block(layer, x, scope)
        if level.upsample is not None:
            if hasattr(level.upsample, "temporal"):
                x = space_time_up(x, model.config)
            else:
                x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
            x = conv(level.upsample.conv, x)
        if level.time_upsample is not None:
            x = time_up(level.time_upsample, x)
    return conv(decoder.conv_out, act(norm(decoder.norm_out, x, scope)))
