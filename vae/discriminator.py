"""The 3D patch discriminator of stage one (a PatchGAN over space and time, as Open-Sora-Plan v1.2)."""

from torch import Tensor, nn


class PatchDiscriminator3D(nn.Module):
    """One logit per space-time patch: (B, in_channels, T, H, W) in [-1, 1] -> (B, 1, t', h', w').

    n_layers=3 halves H and W three times and T twice: 25 x 256 x 256 -> 7 x 32 x 32 logits, 4,665,729 parameters.
    base: width of the first layer; it doubles up to 8 * base. Names of parameters are upstream's (`main.N`).
    """

    def __init__(self, n_layers: int = 3, base: int = 64, in_channels: int = 3):
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers={n_layers}: needs at least 1")
        # First layer: space and time halved, no norm.
        layers = [nn.Conv3d(in_channels, base, 3, stride=2, padding=1)]
        layers.append(nn.LeakyReLU(0.2))
        width = base
        # The others halve space, the first of them time too; the last keeps both.
        for n in range(1, n_layers + 1):
            before, width = width, base * min(2**n, 8)
            time_stride = 2 if n == 1 else 1
            stride = (time_stride, 2, 2) if n < n_layers else 1
            layers += [
                nn.Conv3d(before, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm3d(width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv3d(width, 1, 3, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def _initialise(module: nn.Module) -> None:
    """Draw convolutions from N(0, 0.02) and norm scales from N(1, 0.02), as pix2pix."""
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
