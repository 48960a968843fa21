"""C3D fine-tuned on UCF101: the classifier of the video Inception Score (TGAN, TGAN2, TATS).

The network of Tran et al. (2015) with the weights of TGAN2's release: key names differ from theirs by
`/W` -> `.weight`, `/b` -> `.bias` only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FRAMES = 16  # fc6 fixes it
RESOLUTION = 112
MEAN_SHAPE = (3, 16, 128, 171)

# name, input channels, output channels, kernel of the max-pool that follows, if any
CONVS = (
    ("conv1a", 3, 64, (1, 2, 2)),
    ("conv2a", 64, 128, (2, 2, 2)),
    ("conv3a", 128, 256, None),
    ("conv3b", 256, 256, (2, 2, 2)),
    ("conv4a", 256, 512, None),
    ("conv4b", 512, 512, (2, 2, 2)),
    ("conv5a", 512, 512, None),
    ("conv5b", 512, 512, (2, 2, 2)),
)


class C3D(nn.Module):
    """C3D with 101 logits, 78,409,573 parameters; `mean` is the training set's mean clip, cropped to 112."""

    def __init__(self):
        super().__init__()
        for name, in_channels, out_channels, _ in CONVS:
            self.add_module(name, nn.Conv3d(in_channels, out_channels, 3, padding=1))
        self.fc6 = nn.Linear(8192, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, 101)
        self.register_buffer("mean", torch.zeros(3, NUM_FRAMES, RESOLUTION, RESOLUTION))

    def forward(self, x: Tensor) -> Tensor:
        """Classify x (B, 3, 16, 112, 112) float, BGR pixels 0..255 (see `to_c3d_input`). Returns logits (B, 101)."""
        if tuple(x.shape[1:]) != (3, NUM_FRAMES, RESOLUTION, RESOLUTION):
            raise ValueError(f"C3D got {tuple(x.shape)}: it needs (B, 3, 16, 112, 112), exactly 16 frames")
        x = x - self.mean
        # Eight convolutions and five pools: (B, 3, 16, 112, 112) -> (B, 512, 1, 4, 4)
        for name, _, _, pool in CONVS:
            x = F.relu(getattr(self, name)(x))
            if pool:  # ceil_mode: 7 -> 4 at the last pool, or fc6 would not fit
                x = F.max_pool3d(x, pool, pool, ceil_mode=True)
        # Three fully connected layers: (B, 8192) -> (B, 101)
        x = F.relu(self.fc6(x.flatten(1)))
        return self.fc8(F.relu(self.fc7(x)))


def to_c3d_input(clip: Tensor) -> Tensor:
    """Prepare a clip (16, H, W, 3) uint8 RGB: (3, 16, 112, 112) float32 BGR, 0..255, before the mean.

    Bilinear with align_corners=True, as the release (chainer's default); half-pixel centres would change the
    probabilities by up to 0.02.
    """
    frames = clip.flip(-1).float().permute(0, 3, 1, 2)
    frames = F.interpolate(frames, size=(RESOLUTION, RESOLUTION), mode="bilinear", align_corners=True)
    return frames.permute(1, 0, 2, 3)


def crop_mean(mean: Tensor) -> Tensor:
    """Cut the release's mean clip (3, 16, 128, 171), BGR, any flat layout, to the centre that the network sees."""
    if mean.numel() != 3 * 16 * 128 * 171:
        raise ValueError(
            f"mean clip has shape {tuple(mean.shape)}: it needs the {MEAN_SHAPE} values of mean2.npz"
        )
    return mean.reshape(MEAN_SHAPE)[:, :, 8:120, 8:120].float()
