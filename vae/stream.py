"""What a stream of frames needs between its steps: the state of the layers, and steps of equal size from any chunks."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class StreamState:
    """What one stream remembers between steps, keyed by module.

    frames: the trailing input frames a module needs again. weights: kernels derived from a module's weights,
    made once per stream. `first` is True while the first frame (which comes alone) is on its way.
    """

    def __init__(self):
        self.first = True
        self.frames: dict[nn.Module, Tensor] = {}
        self.weights: dict[nn.Module, tuple[Tensor, ...]] = {}


def regroup(chunks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Cut a stream of (B, C, n, H, W), whatever its chunks, into steps of 1, size, size, ... frames.

    Steps are fresh copies in channels-last order, so that the same frames give the same bits. Frames after the
    last whole step are dropped; the caller checks the length. Raises ValueError if chunks differ in more than n.
    """
    rest, wanted = None, 1
    for chunk in chunks:
        B, C, _, H, W = chunk.shape
        if rest is not None and rest.shape != (B, C, rest.shape[2], H, W):
            raise ValueError(
                f"stream: a piece of shape {tuple(chunk.shape)} after {tuple(rest.shape)}: only the number of frames may differ"
            )
        rest = chunk if rest is None or rest.shape[2] == 0 else torch.cat((rest, chunk), dim=2)
        while rest.shape[2] >= wanted:
            yield rest[:, :, :wanted].clone(memory_format=torch.channels_last_3d)
            rest, wanted = rest[:, :, wanted:], size
        rest = rest.clone()  # the caller may reuse its buffer
