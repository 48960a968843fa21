"""Measure a video VAE on clips: scores, time and memory. `pipelines.table vaes` shows several side by side.

A clip that a VAE cannot take is padded with its last frame, and the padding cut off again.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data.clip import to_float, to_uint8
from data.progress import Progress
from eval.features import Extractor, extract_features, i3d_extractor
from eval.fidelity import check_lpips_size, load_lpips
from eval.protocol import MAX_FRAMES, MIN_FRAMES
from eval.weights import score_name
from pipelines.efficiency import memory_peaks, reset_peaks
from pipelines.plan.pretend import LOWEST_TORCH, too_old
from pipelines.plan.programs import encode_and_decode
from pipelines.reconstruct import rfvd_scores, score_frames
from pipelines.training.open import weights_digest
from vae import build_like
from vae.registry import name_of

Record = dict[str, Any]


# ---- which clips -----------------------------------------------------------------------------------------


def common_length(vaes: dict[str, Any], least: int) -> int:
    """The least length of `least` frames or more that all VAEs with a first frame alone take: 1 + lcm * k."""
    with_first = [vae for vae in vaes.values() if vae.clip_lengths[1] == 1]
    group = math.lcm(*[vae.clip_lengths[0] for vae in with_first])
    T = -(-(max(least, 1) - 1) // group) * group + 1
    while not all(_takes(vae, T) for vae in with_first):
        T += group
    return T


def _takes(vae: Any, T: int) -> bool:
    try:
        vae.check_frames(T)
    except ValueError:
        return False
    return True


def own_length(vae: Any, T: int) -> int:
    """The least length from T on that the VAE takes; the clip is padded to it with its last frame."""
    longest = T + 2 * sum(vae.clip_lengths)
    for n in range(T, longest + 1):
        if _takes(vae, n):
            return n
    raise ValueError(f"{type(vae).__name__} takes no clip of {T} to {longest} frames; choose other --frames")


# ---- one VAE ---------------------------------------------------------------------------------------------


@dataclass
class Judges:
    """What scores the clips. network, weights: LPIPS and its provenance. remarks: which is absent, and why."""

    network: Any = None
    weights: dict[str, Any] | None = None
    i3d: Extractor | None = None
    remarks: list[str] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        """What a kept record must share with this call."""
        return {
            "lpips": None if self.network is None else score_name("lpips", self.weights),
            "rfvd": self.i3d and self.i3d.provenance.as_dict(),
        }


def open_judges(
    lpips: str | None, i3d: str | None, size: int, clips: int, frames: int, device: torch.device
) -> Judges:
    """LPIPS and I3D for a number of clips of a size and length; one that cannot judge them, or whose weights are not there is left out, and said so.

    lpips, i3d: their files or folders, None for the usual places.
    """
    judges = Judges()
    try:
        network, provenance = load_lpips(lpips, device)
        judges.weights = provenance.as_dict()
        check_lpips_size(size, size)
        judges.network = network
    except ValueError as error:
        judges.remarks.append(f"LPIPS not run: {error}")
    try:
        if clips < 2:
            raise ValueError(f"{clips} clips: a distance of distributions needs two")
        if not MIN_FRAMES <= frames <= MAX_FRAMES:
            raise ValueError(f"clips of {frames} frames: I3D takes {MIN_FRAMES} to {MAX_FRAMES}")
        judges.i3d = i3d_extractor(i3d, device)
    except ValueError as error:
        judges.remarks.append(f"rFVD not run: {error}")
    return judges


@torch.inference_mode()
def through(vae: Any, clip: np.ndarray, device: torch.device) -> tuple[np.ndarray, float, float]:
    """(reconstruction uint8 (T, H, W, 3), seconds to encode, to decode) of one clip; padded where the VAE needs it."""
    T = len(clip)
    padded = np.concatenate([clip, clip[-1:].repeat(own_length(vae, T) - T, axis=0)])
    x = to_float(padded)[None].to(device)
    start = _now(device)
    found = vae.encode(x)
    z = found.latents if vae.discrete else found.latent_dist.mode()
    encoded = _now(device)
    y = vae.decode(z).sample
    decoded = _now(device)
    return to_uint8(y.float().clamp(-1, 1))[0][:T], encoded - start, decoded - encoded


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(vae: Any, T: int, size: int, device: torch.device) -> tuple[float | None, str]:
    """(MiB of encode and decode of one clip, measured or modelled): modelled where there is no GPU to measure on.

    (None, why) with a torch that cannot model it.
    """
    if measured := memory_peaks(device)["allocated_mib"]:
        return measured, "measured"
    if too_old():
        return None, f"modelled with torch >= {LOWEST_TORCH}"

    def same_size() -> Any:
        return build_like(name_of(type(vae).__name__), dict(vae.config)).eval()

    simulation = encode_and_decode(same_size, own_length(vae, T), size)
    return simulation.peak / 2**20, "modelled, one GPU, fp32"


def measure(
    vae: Any, clips: list[np.ndarray], device: torch.device, judges: Judges
) -> tuple[Record, list[np.ndarray]]:
    """(what a row says, the reconstructions) of one VAE."""
    T, size = clips[0].shape[:2]
    # The first call chooses kernels, so it is not timed.
    vae = vae.to(device)
    through(vae, clips[0], device)
    reset_peaks(device)

    # Reconstruct every clip: times, scores and pictures.
    decoded, times = [], []
    scores: dict[str, list[float]] = {}
    with Progress(len(clips), type(vae).__name__, "clip") as bar:
        for clip in clips:
            video, *seconds = through(vae, clip, device)
            decoded.append(video)
            times.append(seconds)
            for name, values in score_frames(clip, video, judges.network, judges.weights).items():
                scores.setdefault(name, []).append(float(np.mean(values)))
            bar.update()

    # What the latents cost, in numbers and in memory.
    own = own_length(vae, T)
    numbers = vae.latent_frames(own) * vae.latent_channels * (size // vae.spatial_compression_ratio) ** 2
    mib, how = peak_memory(vae, T, size, device)
    encode, decode = np.median(times, axis=0)
    record = {
        "class": type(vae).__name__,
        "weights_sha256": weights_digest(vae),
        "params": vae.num_parameters(),
        "ratio": [vae.temporal_compression_ratio, vae.spatial_compression_ratio],
        "numbers_per_pixel": numbers / (T * size * size),
        "frames": T,
        "padded_to": own if own != T else None,
        **{name: float(np.mean(values)) for name, values in scores.items()},
        "encode_s": float(encode),
        "decode_s": float(decode),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_mib": mib,
        "peak_how": how,
    }
    # rFVD, under the name that the network allows.
    if judges.i3d is not None:
        real, fake = extract_features(clips, judges.i3d), extract_features(decoded, judges.i3d)
        record |= rfvd_scores(real, fake, judges.i3d.provenance)
    return record, decoded
