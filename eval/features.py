"""Run a judging network over clips: uint8 clips in, float32 features out, a batch at a time.

Networks judge in float32: eval mode, no autocast, TF32 off for convolutions and products. I3D in bf16 is
another metric.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from eval.c3d import to_c3d_input
from eval.i3d import EPS_TATS, to_i3d_input
from eval.i3d_fast import FastI3D
from eval.i3d_scripted import load_scripted_i3d, scripted_i3d
from eval.weights import Provenance, load_c3d, load_i3d


@dataclass(frozen=True)
class Extractor:
    """A network, what it wants as input, and where its weights come from.

    network: (B, 3, T, H, W) float -> (B, D). prepare: one clip (T, H, W, 3) uint8 -> (3, T, H', W') float.
    settings: whatever else changes the features, for the cache's key.
    """

    network: nn.Module
    prepare: Callable[[Tensor], Tensor]
    provenance: Provenance
    device: torch.device
    settings: dict = field(default_factory=dict)


def default_device(rank: int = 0) -> torch.device:
    """Choose the GPU of this process (ranks of a machine take its GPUs in turn), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def device_of(name: str | None, rank: int = 0) -> torch.device:
    """Choose the device that --device names; "" or None: a GPU if there is one. "cuda" is the rank's own GPU.

    Raises ValueError for a device that is not here.
    """
    if not name or (name == "cuda" and torch.cuda.is_available()):
        return default_device(rank)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}; cpu, cuda, or cuda:N of a GPU that is here") from None
    return device


def i3d_extractor(weights=None, device=None, eps: float = EPS_TATS, resize: str = "squash") -> Extractor:
    """Make the extractor of I3D, 400 logits (FVD, KVD). weights: as `load_i3d`; eps, resize: as `I3D`, `to_i3d_input`.

    A verified i3d_torchscript.pt runs as it is, with its own resize for "squash".
    """
    device = torch.device(device) if device is not None else default_device()
    settings = {"eps": eps, "resize": resize}
    if (path := scripted_i3d(weights)) is not None:
        network, prepare, provenance = load_scripted_i3d(path, eps, resize)
        return Extractor(network.to(device), prepare, provenance, device, settings)
    network, provenance = load_i3d(weights, eps)
    prepare = partial(to_i3d_input, resize=resize)
    return Extractor(FastI3D(network).to(device), prepare, provenance, device, settings)


def c3d_extractor(weights=None, device=None) -> Extractor:
    """Make the extractor of C3D, 101 logits (IS). weights: as `load_c3d`."""
    device = torch.device(device) if device is not None else default_device()
    network, provenance = load_c3d(weights)
    return Extractor(network.requires_grad_(False).to(device), to_c3d_input, provenance, device)


@contextlib.contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Run the block with no gradients, no autocast and no TF32; the settings found are put back."""
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device_type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


def _check_clip(clip: np.ndarray, first_shape: tuple[int, ...], index: int) -> None:
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(
            f"clip {index} is {clip.dtype} {clip.shape}: clips are uint8 (T, H, W, 3), see data.clip.to_uint8"
        )
    if clip.shape != first_shape:
        raise ValueError(
            f"clip {index} is {clip.shape}, the first one is {first_shape}: all clips need one shape"
        )


def extract_features(
    clips: Iterable[np.ndarray],
    extractor: Extractor | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Compute the features of clips, in their order. Memory holds one batch of clips at a time.

    clips: any iterable of (T, H, W, 3) uint8 arrays of one shape. extractor: default I3D from
    $OMNILATTE_WEIGHTS. on_batch: called with the number of clips done since the last call (a progress bar).
    Returns (N, D) float32: 400 logits of I3D, 101 of C3D.
    Raises ValueError for no clips, a wrong dtype or shape, or features that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    extractor = extractor if extractor is not None else i3d_extractor()
    features, shape, done, clips = [], None, 0, iter(clips)
    while batch := list(itertools.islice(clips, batch_size)):
        # All clips have one shape, that of the first.
        shape = shape or batch[0].shape
        for offset, clip in enumerate(batch):
            _check_clip(clip, shape, done + offset)
        # Prepare each clip as the network wants it, and run the batch in exact float32.
        with exact_float32(extractor.device.type):
            inputs = []
            for clip in batch:
                clip = np.require(clip, requirements=["C", "W"])  # torch wants memory that it may write
                pixels = torch.from_numpy(clip).to(extractor.device)
                inputs.append(extractor.prepare(pixels).permute(1, 2, 3, 0))
            # (B, 3, T, H, W), stacked in (B, T, H, W, 3) memory order: the layout of frames, and of the fast network
            stacked = torch.stack(inputs).permute(0, 4, 1, 2, 3)
            output = extractor.network(stacked).float().cpu().numpy()
        # A score of features that are not numbers would be silently wrong.
        if output.ndim != 2 or len(output) != len(batch):
            raise ValueError(f"the network returned {output.shape} for {len(batch)} clips instead of (B, D)")
        if not np.isfinite(output).all():
            raise ValueError(
                f"features of clips {done}..{done + len(batch) - 1} are not finite: wrong weights?"
            )
        features.append(output)
        done += len(batch)
        if on_batch is not None:
            on_batch(len(batch))
    if not features:
        raise ValueError("no clips: a score needs at least one")
    return np.concatenate(features)
