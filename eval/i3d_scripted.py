"""StyleGAN-V's i3d_torchscript.pt: a program with weights, run as it is, and only if it is the published file.

torch.jit.load runs what is in the file, so the sha256 comes first. The module has batch-norm epsilon 1e-3 and its
own resize to 224; it returns the 400 logits when asked for features.
"""

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from eval.i3d import EPS_TF, check_input, to_i3d_input
from eval.weights import WEIGHT_FILES, Provenance, find_weights, identify, random_seed


class ScriptedI3D(nn.Module):
    """The opaque module behind the input and output of `I3D`.

    own_resize: pixels 0..255 of any size go in and the module resizes and scales; else (B, 3, T, 224, 224) in
    [-1, 1].
    """

    def __init__(self, scripted: nn.Module, own_resize: bool):
        super().__init__()
        self.scripted, self.own_resize = scripted, own_resize

    def forward(self, x: Tensor) -> Tensor:
        if not self.own_resize:
            check_input(x)
        # The profiling executor's first calls differ from later ones: not used.
        with torch.jit.optimized_execution(False):
            return self.scripted(x, rescale=self.own_resize, resize=self.own_resize, return_features=True)


def _raw_pixels(clip: Tensor) -> Tensor:
    """Turn (T, H, W, 3) uint8 into (3, T, H, W) float32, 0..255."""
    return clip.float().permute(3, 0, 1, 2)


def scripted_i3d(weights: str | os.PathLike | None) -> Path | None:
    """Return the path of the TorchScript file if that is what `weights` leads to, else None."""
    if random_seed(weights) is not None:
        return None
    path = find_weights("i3d", weights)
    return path if path.name == WEIGHT_FILES["i3d_torchscript"].file else None


def load_scripted_i3d(path: Path, eps: float, resize: str) -> tuple[ScriptedI3D, partial, Provenance]:
    """Load (network, preprocessing of a clip, provenance). ValueError for another file, or another eps than 1e-3."""
    provenance = identify(path, "i3d_torchscript")
    if not provenance.known:
        raise ValueError(
            f"{path}: sha256 {provenance.sha256} is not the published {WEIGHT_FILES['i3d_torchscript'].sha256}; a "
            "TorchScript file runs code, so another one is not loaded"
        )
    if eps != EPS_TF:
        raise ValueError(
            f"eps={eps}: {path.name} has batch-norm epsilon 1e-3 built in; use --protocol stylegan-v or --eps 1e-3, "
            f"or {WEIGHT_FILES['i3d'].file}"
        )
    own_resize = resize == "squash"
    prepare = partial(_raw_pixels) if own_resize else partial(to_i3d_input, resize=resize)
    return ScriptedI3D(torch.jit.load(path, map_location="cpu").eval(), own_resize), prepare, provenance
