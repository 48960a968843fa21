"""A video of any length and size through a VAE: padded, streamed or in pieces, cropped back to what it was.

video = encode_video(vae, frames)       # uint8 (T, H, W, 3), or its frames as they come: data.video.iterate_frames("in.mp4")
frames = decode_video(vae, video)       # uint8 (T, H, W, 3), as many frames and pixels as before

H and W grow to what the VAE can divide, T to a length that it takes, by repeating the last row, column and frame. A VAE
that can be streamed takes the whole length in constant memory with the bits of one clip; any other takes pieces of
`window` frames on their own, which is exact for image VAEs only.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.core.tensors import to_float, to_uint8

AT_ONCE = 8  # frames handed to a stream at once; the result does not depend on it
MOST = 4096  # how far a length or side is enlarged to fit


@dataclass(frozen=True)
class VideoLatents:
    """latents: (C, t, h, w) float32 on the CPU, posterior means or codebook entries, not normalised.

    num_frames, height, width: of the video, without padding. window: frames of a piece; 0: one stream.
    """

    latents: Tensor
    num_frames: int
    height: int
    width: int
    window: int


def _fitting(least: int, check: Any) -> int:
    """Find the first number from `least` on that `check` does not refuse."""
    for n in range(least, least + MOST):
        try:
            check(n)
        except ValueError as error:
            refused = error
        else:
            return n
    raise refused


def window_of(vae: Any, frames: int = 33) -> int:
    """Choose the frames of a piece for this VAE: 0 where it streams, else the first length it takes from `frames` on."""
    return 0 if getattr(vae, "can_stream", False) else _fitting(frames, vae.check_frames)


def padded(vae: Any, height: int, width: int) -> tuple[int, int]:
    """Find the sides that a video of height x width is enlarged to. The two may have rules of their own."""
    try:
        vae.check_sides(height, width)
    except ValueError:
        # One side at a time: beside one that fits, the other is refused for itself alone.
        square = _fitting(max(height, width), lambda n: vae.check_sides(n, n))
        height = _fitting(height, lambda n: vae.check_sides(n, square))
        width = _fitting(width, lambda n: vae.check_sides(height, n))
    return height, width


def _pieces(frames: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    frames = iter(frames)
    while piece := list(itertools.islice(frames, size)):
        yield np.stack(piece)


def _latents(vae: Any, x: Tensor) -> Tensor:
    encoded = vae.encode(x)
    return encoded.latents if vae.discrete else encoded.latent_dist.mode()


@torch.no_grad()
def encode_frames(vae: Any, frames: Iterable[np.ndarray], window: int) -> Iterator[Tensor]:
    """Yield latents (1, C, n, h, w) of frames uint8 (H, W, 3) as they come; window: of `window_of`."""

    def pixels() -> Iterator[Tensor]:
        for piece in _pieces(frames, window or AT_ONCE):
            height, width = padded(vae, *piece.shape[1:3])
            x = to_float(piece)[None].to(vae.device, vae.dtype)
            # repeat the last row and column
            yield F.pad(x, (0, width - x.shape[4], 0, height - x.shape[3], 0, 0), mode="replicate")

    # Pieces on their own, the last one as long as the VAE needs it.
    if window:
        for x in pixels():
            yield _latents(vae, _longer(x, _fitting(x.shape[2], vae.check_frames)))
        return

    # Or one stream, with the last frame repeated at its end up to a length that the VAE takes.
    def whole() -> Iterator[Tensor]:
        count, last = 0, None
        for last in pixels():
            count += last.shape[2]
            yield last
        if last is not None and (rest := _fitting(count, vae.check_frames) - count):
            yield last[:, :, -1:].expand(-1, -1, rest, -1, -1)

    for posterior in vae.stream_encode(whole()):
        yield posterior.mode()


def _longer(x: Tensor, T: int) -> Tensor:
    """Repeat the last frame of x (B, C, n, H, W) up to T frames."""
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, T - x.shape[2], -1, -1)], dim=2)


@torch.no_grad()
def decode_frames(vae: Any, latents: Iterable[Tensor], window: int) -> Iterator[np.ndarray]:
    """Yield frames uint8 (n, H, W, 3), padding included, of latents as `encode_frames` gives them."""
    if not window:
        for frames in vae.stream_decode(latents):
            yield to_uint8(frames)[0]
        return
    for z in latents:  # contiguous: a layout of its own may round in its own way
        yield to_uint8(vae.decode(z.contiguous()).sample)[0]


def encode_video(vae: Any, video: np.ndarray | Iterable[np.ndarray], window: int = 33) -> VideoLatents:
    """Encode frames uint8 (T, H, W, 3), or an iterable of (H, W, 3). ValueError for a video without frames.

    window: about how many frames a VAE that cannot be streamed takes at once.
    """
    shape, count = None, 0
    window = window_of(vae, window)

    # Check each frame as it passes, and count them: the length of an iterable is known at its end only.
    def counted() -> Iterator[np.ndarray]:
        nonlocal shape, count
        for frame in video:
            if frame.dtype != np.uint8 or frame.shape != (shape or frame.shape) or frame.shape[2:] != (3,):
                raise ValueError(
                    f"frame {count}: {frame.dtype} {frame.shape}; all frames are uint8 (H, W, 3) of one size"
                )
            shape, count = frame.shape, count + 1
            yield frame
        if shape is None:
            raise ValueError("a video without frames")

    pieces = [z[0].float().cpu() for z in encode_frames(vae, counted(), window)]
    return VideoLatents(torch.cat(pieces, dim=1), count, *shape[:2], window)


def decode_stream(vae: Any, video: VideoLatents) -> Iterator[np.ndarray]:
    """Decode as `decode_video`, piece by piece: uint8 (n, H, W, 3).

    ValueError for latents that hold fewer frames than they say.
    """
    # Latent frames of each piece: one, or those of a window, the last of which was shorter.
    z = video.latents[None].to(vae.device, vae.dtype)
    if video.window:
        whole, rest = divmod(video.num_frames, video.window)
        sizes = [vae.latent_frames(video.window)] * whole
        sizes += [vae.latent_frames(_fitting(rest, vae.check_frames))] * (rest > 0)
    else:
        sizes = [1] * z.shape[2]
    if sum(sizes) != z.shape[2]:
        raise ValueError(f"{z.shape[2]} latent frames, {sum(sizes)} needed for {video.num_frames} frames")
    # Of each piece its own frames, without the padding in time and space.
    done, kept = 0, 0
    for frames in decode_frames(vae, z.split(sizes, dim=2), video.window):
        end = min(done + (video.window or len(frames)), video.num_frames)
        if end > done:
            yield frames[: end - done, : video.height, : video.width]
            kept += len(frames[: end - done])
        done = end
    if kept != video.num_frames:
        raise ValueError(f"{kept} of {video.num_frames} frames decoded: these are the latents of another VAE")


def decode_video(vae: Any, video: VideoLatents) -> np.ndarray:
    """Decode the video, uint8 (T, H, W, 3)."""
    return np.concatenate(list(decode_stream(vae, video)))
