"""The weight rule of the frozen outputs: every tensor is drawn from the crc32 of its own name."""

import zlib

import numpy as np
import torch
from torch import nn


def draw(key: str, shape) -> torch.Tensor:
    """The rule's float32 tensor for one state-dict key; 1-D `.weight` (norm scales) are centred on 1."""
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    values = values.astype(np.float32) * np.float32(0.05)
    if len(shape) == 1 and key.endswith(".weight"):
        values = 1 + values
    return torch.from_numpy(values)


def fill_by_rule(model: nn.Module) -> nn.Module:
    """Fill every parameter by the rule (buffers keep their values); returns the model in eval mode."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(draw(key, parameter.shape))
    return model.eval()
