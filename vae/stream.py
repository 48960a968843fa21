"""What a stream of frames needs between its steps: the state of the layers, and steps of equal size from any chunks."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


class StreamState:
    """What one stream remembers between steps, keyed by module.

    frames: the trailing input frames a module needs again. `first` is True while the first frame (which comes
    alone) is on its way.
    """

    def __init__(self):
        self.first = True
        self.frames: dict[nn.Module, Tensor] = {}


def regroup(chunks: Iterable[Tensor], unit: int, units: Callable[[Tensor], int]) -> Iterator[Tensor]:
    """Cut a stream of (B, C, n, H, W), whatever its chunks, into steps of 1, size, size, ... frames and the rest.

    size = unit * units(first chunk). Steps are fresh copies in channels-last order, so that the same frames give the
    same bits. The last step is shorter, a multiple of unit; frames after that are dropped, the caller checks the
    length. Raises ValueError if chunks differ in more than n.
    """
    rest, wanted, size = None, 1, unit
    for chunk in chunks:
        B, C, _, H, W = chunk.shape
        # Join the piece to what is left of those before.
        if rest is None:
            size = unit * units(chunk)
        elif rest.shape != (B, C, rest.shape[2], H, W):
            raise ValueError(
                f"stream: a piece of shape {tuple(chunk.shape)} after {tuple(rest.shape)}: only the number of frames may differ"
            )
        rest = chunk if rest is None or rest.shape[2] == 0 else torch.cat((rest, chunk), dim=2)
        # The first frame alone, then steps of one size.
        while rest.shape[2] >= wanted:
            yield rest[:, :, :wanted].clone(memory_format=torch.channels_last_3d)
            rest, wanted = rest[:, :, wanted:], size
        rest = rest.clone()  # the caller may reuse its buffer
    # What is left at the end, in whole latent frames.
    last = 0 if rest is None else rest.shape[2] // unit * unit
    if last:
        yield rest[:, :, :last].clone(memory_format=torch.channels_last_3d)
