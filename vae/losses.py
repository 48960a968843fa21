"""Losses of stage one: reconstruction, KL, perceptual and adversarial terms (paper 4.1).

Reductions are those of Open-Sora-Plan v1.2 (after taming-transformers), odd ones included, because the paper's
weights (1e-6 for KL, 0.5 for the adversarial term) only mean something together with them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vae.interface import VideoGaussian


@dataclass
class ReconstructionLoss:
    """Scalars of one step. total = nll + kl_weight * kl is what the generator minimises; rec, perceptual are to log."""

    total: Tensor
    nll: Tensor  # summed over C, H, W, mean over frames
    kl: Tensor  # nats, summed over the latent clip, mean over the batch
    rec: Tensor  # mean over every element, detached
    perceptual: Tensor  # mean over frames, detached; 0 without a perceptual term


def reconstruction_and_kl(
    x: Tensor,
    xhat: Tensor,
    posterior: VideoGaussian,
    *,
    kl_weight: float = 1e-6,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 1.0,
    loss_type: str = "l1",
) -> ReconstructionLoss:
    """Compute reconstruction, perceptual and KL terms. x, xhat: (B, 3, T, H, W) in [-1, 1].

    perceptual: frames (B T, 3, H, W) twice -> one distance per frame, e.g. `LPIPSLoss`.
    nll = (1 / BT) sum over frames, channels and pixels of (|x - xhat| + perceptual_weight * p), so a frame's p is
    counted C * H * W times (as upstream: that broadcast sets the balance of the two terms). The KL term is divided
    by B alone, not by the number of frames. Upstream's learned log-variance is fixed at 0 in its 3D loss, so it is
    left out here.
    """
    if x.shape != xhat.shape:
        raise ValueError(f"x is {tuple(x.shape)}, xhat is {tuple(xhat.shape)}: both need (B, 3, T, H, W)")
    if loss_type not in ("l1", "l2"):
        raise ValueError(f'loss_type={loss_type!r}: needs "l1" or "l2"')
    B, _, T, _, _ = x.shape
    x, xhat = x.transpose(1, 2).flatten(0, 1), xhat.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
    # Reconstruction: the error of a frame, summed over channels and pixels.
    error = (x - xhat).abs() if loss_type == "l1" else (x - xhat).square()
    nll = error.sum() / (B * T)
    # Perceptual: a frame's distance counts once per channel and pixel, as upstream.
    distance = error.new_zeros(())
    if perceptual is not None and perceptual_weight > 0:
        distance = perceptual(x, xhat).reshape(B * T).mean()
        nll = nll + perceptual_weight * x[0].numel() * distance
    # KL: of a clip, whatever its number of frames.
    kl = posterior.kl().sum() / B
    return ReconstructionLoss(nll + kl_weight * kl, nll, kl, error.detach().mean(), distance.detach())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Compute -mean D(xhat), which the VAE minimises to fool the discriminator."""
    return -fake_logits.mean()


def hinge_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute the discriminator's hinge loss, half the sum of its two means. Give it logits of a detached xhat."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Compute |d nll / d W| / (|d g_loss / d W| + 1e-4), clamped to [0, 1e4], detached; W = `ODVAE.last_decoder_layer`.

    Balances the adversarial term with nll, reconstruction and LPIPS: not with the KL term, nor with added ones. Multiply it by the term's own weight (0.5 upstream).
    Keeps the graph, so that backward can follow.
    """
    (nll_grad,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (g_grad,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
    weight = nll_grad.float().norm() / (g_grad.float().norm() + 1e-4)
    return weight.clamp(0.0, 1e4).detach()


AT_ONCE = 25 * 256 * 256  # pixels whose activations are kept: a clip of the paper


class LPIPSLoss(nn.Module):
    """LPIPS distance per frame by a frozen network (PyPI package `lpips`); gradients flow to the frames only.

    recompute: take larger clips a few frames at a time, and compute their activations again in backward.
    """

    def __init__(self, network: nn.Module, recompute: bool = False):
        super().__init__()
        self.lpips = network.requires_grad_(False).eval()
        self.recompute = recompute

    def train(self, mode: bool = True) -> "LPIPSLoss":
        """Stay in eval mode: the heads have dropout."""
        return super().train(False)

    def forward(self, x: Tensor, xhat: Tensor) -> Tensor:
        """Compute the distance of each frame: x, xhat (N, 3, H, W) in [-1, 1] -> (N,)."""
        frames = max(1, AT_ONCE // x[0, 0].numel())
        if not (self.recompute and xhat.requires_grad and len(x) > frames):
            return self.lpips(x, xhat).flatten()
        # A few frames at a time, whose activations are computed again in backward.
        distances = []
        for pair in zip(x.split(frames), xhat.split(frames), strict=True):
            distances.append(checkpoint(self.lpips, *pair, use_reentrant=False).flatten())
        return torch.cat(distances)
