"""Small real models and what tests measure on them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae.odvae import ODVAE

WIDTHS = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}


def tiny(preset: str = "odvae", dtype=torch.float64, **overrides) -> ODVAE:
    """A preset at width 8 in eval mode, its weights enlarged so that no path of the network fades."""
    model = ODVAE.preset(preset, **{**WIDTHS, **overrides}).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def clip(T: int, H: int = 16, W: int = 24, B: int = 1, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(B, 3, T, H, W, dtype=dtype) * 2 - 1


def pieces(x: torch.Tensor, plan: list[int]):
    """x cut along time; copies, so that nobody can look at a neighbour."""
    return (piece.clone() for piece in x.split(plan, dim=2))


def moments(model: ODVAE, x: torch.Tensor) -> torch.Tensor:
    return model.encode(x).latent_dist.parameters


def four_tiles(fn, x: torch.Tensor, side: int, step: int, overlap: int) -> torch.Tensor:
    """fn on two by two tiles of x, joined as upstream's loops do, by hand; overlap in fn's output.

    Each tile fades in over the finished one above, then over the finished one to its left.
    """
    a, b, c, d = (fn(x[..., i : i + side, j : j + side]).clone() for i in (0, step) for j in (0, step))
    ramp = torch.arange(overlap, dtype=x.dtype) / overlap
    fade = ramp[:, None]
    keep = a.shape[-1] - overlap
    b[..., :overlap] = (1 - ramp) * a[..., keep:] + ramp * b[..., :overlap]
    for upper, lower in ((a, c), (b, d)):
        lower[..., :overlap, :] = (1 - fade) * upper[..., keep:, :] + fade * lower[..., :overlap, :]
    d[..., :overlap] = (1 - ramp) * c[..., keep:] + ramp * d[..., :overlap]
    top = torch.cat([a[..., :keep, :keep], b[..., :keep, :]], -1)
    return torch.cat([top, torch.cat([c[..., :keep], d], -1)], -2)


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors made inside the context and alive at the same time; the same on every machine."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                if tensor.is_mkldnn:  # oneDNN's own order: a tensor without a storage
                    self._see(tensor, id(tensor), tensor.numel() * tensor.element_size())
                else:
                    storage = tensor.untyped_storage()
                    self._see(storage, storage._cdata, storage.nbytes())
        return out

    def _see(self, storage, key, size):
        if key in self._known:
            return

        def freed(_):
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
