"""How close a reconstruction is to its original: PSNR, SSIM, LPIPS. A program and functions.

    python eval/fidelity.py --real DIR --fake DIR [--no-lpips]

Per frame, then the mean over a video's frames, then over videos (as the Open-Sora-Plan evaluation of the
paper's Table 1). Compare uint8 pixels that were never compressed with loss: mp4 costs up to 10 dB.
"""

import argparse
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from data.core.cli import run
from data.core.files import claim_file, is_json_object
from data.core.lazy import lazy
from data.progress import Progress
from eval.options import size_argument
from eval.weight_files import TRUNKS
from eval.weights import (
    Provenance,
    find_weights,
    load_strict,
    open_weights,
    random_seed,
    randomise,
    require_weights,
)

features = lazy("eval.features")
lpips = lazy("lpips")
ndimage = lazy("scipy.ndimage")
records = lazy("eval.records")
torch = lazy("torch")
videos = lazy("eval.videos")

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
NETWORKS = {"alex": "AlexNet", "vgg": "VGG16"}
LPIPS_LEAST = 31  # pixels that the strides of AlexNet's first layers leave something of


def _check(real: np.ndarray, fake: np.ndarray) -> None:
    """Raise ValueError unless both are uint8 (T, H, W, 3) of one shape."""
    for name, video in (("real", real), ("fake", fake)):
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not len(video):
            raise ValueError(f"{name} is {video.dtype} {video.shape}: videos are uint8 (T, H, W, 3)")
    if real.shape != fake.shape:
        raise ValueError(f"real {real.shape} and fake {fake.shape} differ: a pair has equal frames and size")


def psnr(real: np.ndarray, fake: np.ndarray) -> float:
    """Compute the peak signal-to-noise ratio in dB, mean over frames. Videos (T, H, W, 3) uint8, peak 255.

    A frame with mean squared error below 1e-10 (of pixels in [0, 1]) counts as 100 dB.
    """
    _check(real, fake)
    values = []
    for a, b in zip(real, fake, strict=True):
        error = np.square(a.astype(np.float64) - b).mean() / 255.0**2
        values.append(100.0 if error < 1e-10 else -10.0 * np.log10(error))
    return float(np.mean(values))


def ssim(real: np.ndarray, fake: np.ndarray) -> float:
    """Compute the structural similarity (Wang et al., 2004), mean over frames. Videos (T, H, W, 3) uint8, >= 11 x 11.

    Gaussian window 11 x 11, sigma 1.5, positions where it fits, per RGB channel, biased variances, float64.
    """
    _check(real, fake)
    if min(real.shape[1:3]) < WINDOW:
        raise ValueError(
            f"frames of {real.shape[1]}x{real.shape[2]}: SSIM's window needs at least 11 x 11 pixels"
        )
    return float(np.mean([_ssim_frame(a / 255.0, b / 255.0) for a, b in zip(real, fake, strict=True)]))


def _blur(image: np.ndarray) -> np.ndarray:
    """Take the Gaussian mean at the positions where the window fits: (H, W, 3) -> (H - 10, W - 10, 3)."""
    radius = WINDOW // 2
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / SIGMA))
    weights /= weights.sum()
    rows = ndimage.correlate1d(image, weights, axis=0)[radius:-radius]
    return ndimage.correlate1d(rows, weights, axis=1)[:, radius:-radius]


def _ssim_frame(a: np.ndarray, b: np.ndarray) -> float:
    # Local means, variances (var_a + var_b) and covariance: E[xy] - E[x] E[y].
    mean_a, mean_b = _blur(a), _blur(b)
    squares, product = mean_a**2 + mean_b**2, mean_a * mean_b
    variances = _blur(a * a + b * b) - squares
    covariance = _blur(a * b) - product
    score = (2 * product + C1) * (2 * covariance + C2) / ((squares + C1) * (variances + C2))
    return float(score.mean())


def load_lpips(weights=None, device="cpu", net: str = "alex"):
    """Load LPIPS (Zhang et al., 2018) in eval mode, frozen, with the provenance of its trunk.

    net: "alex", the judge; "vgg", the loss of stage one. weights: as `find_weights`, or random:SEED. The linear
    heads come with the `lpips` package. Raises ValueError naming the way out when there is no trunk.
    """
    if net not in TRUNKS:
        raise ValueError(f"net={net!r}: LPIPS has {', '.join(TRUNKS)}")
    kind, seed = TRUNKS[net], random_seed(weights)
    path = find_weights(kind, weights) if seed is None else None
    state, provenance = open_weights(kind, path) if path else ({}, None)

    # The package brings its linear heads and the trunk's architecture, without weights.
    with warnings.catch_warnings():  # torchvision's renamed argument, inside lpips
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    network.requires_grad_(False).eval()
    if path is None:
        randomise(network.net, seed)
        return network.to(device), Provenance(NETWORKS[net], f"random:{seed}", "", False, seed)
    # Torchvision's features.0.weight is slice1.0.weight in lpips.
    names = {f"features.{key.split('.', 1)[1]}": key for key in network.net.state_dict()}
    load_strict(network.net, {names.get(key, key): value for key, value in state.items()}, str(path))
    return network.to(device), provenance


def check_lpips_size(height: int, width: int) -> None:
    """Raise ValueError for frames from which AlexNet's deeper layers get nothing."""
    if min(height, width) < LPIPS_LEAST:
        raise ValueError(
            f"frames of {height}x{width}: LPIPS's AlexNet needs at least {LPIPS_LEAST} x {LPIPS_LEAST} pixels; "
            "use larger frames or leave LPIPS out"
        )


def lpips_distance(real: np.ndarray, fake: np.ndarray, network, batch_size: int = 8) -> float:
    """Compute LPIPS, mean over frames. Videos (T, H, W, 3) uint8, >= 31 x 31; network: from `load_lpips`."""
    _check(real, fake)
    check_lpips_size(*real.shape[1:3])
    device = next(network.parameters()).device

    def frames(video: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.require(video, requirements=["C", "W"])).to(device)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0

    values = []
    with features.exact_float32(device.type):
        for start in range(0, len(real), batch_size):
            part = slice(start, start + batch_size)
            values.append(network(frames(real[part]), frames(fake[part])).flatten().double().cpu())
    return float(torch.cat(values).mean())


# ---- the table of metrics --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameMetric:
    """A score of two uint8 videos (T, H, W, 3) of one shape, the mean over frames.

    name: as printed; its lower case is the key in summaries and logs. measure: called with (original, decoded), and with
    the network of `load_lpips` as a third argument where network is True. digits: shown after the point.
    """

    name: str
    measure: Callable[..., float]
    digits: int
    unit: str = ""
    network: bool = False

    @property
    def key(self) -> str:
        return self.name.lower()

    @property
    def label(self) -> str:
        """The name with its unit, for a column or an axis."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def text(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


# A metric that is added here is measured by this program, by stage one's validation and by pipelines.reconstruct, and
# shown in their tables, pages and model cards.
METRICS = (
    FrameMetric("PSNR", psnr, 2, "dB"),
    FrameMetric("SSIM", ssim, 4),
    FrameMetric("LPIPS", lpips_distance, 4, network=True),
)


def measures(network=None) -> dict[FrameMetric, Callable[[np.ndarray, np.ndarray], float]]:
    """Map each metric that can be measured to its function: those that need a network only where it is given."""
    found = {}
    for metric in METRICS:
        if not metric.network:
            found[metric] = metric.measure
        elif network is not None:
            found[metric] = partial(metric.measure, network=network)
    return found


# ---- two folders -----------------------------------------------------------------------------------------


def pair_videos(real_root: str, fake_root: str) -> list[tuple]:
    """Pair the videos of two folders by relative name (suffix aside). ValueError if one lacks a partner."""
    from eval.selection import list_folder

    def pair_name(video, root: Path) -> str:
        place = "" if root.is_file() else video.path.relative_to(root)
        place = place if video.path.is_dir() or root.is_file() else place.with_suffix("")
        return f"{place} {video.key} {video.row}"

    # Name each video of both folders, without its suffix.
    sides = []
    for root in (Path(real_root), Path(fake_root)):
        videos = list_folder(root).videos
        named = {pair_name(video, root): video for video in videos}
        if len(named) < len(videos):
            raise ValueError(f"{root}: two videos have one name but for their suffix: pairs are made by name")
        sides.append(named)
    # Every name must be on both sides: a missing file must not raise the mean.
    alone = set(sides[0]) ^ set(sides[1])
    if alone:
        first = min((sides[0] | sides[1])[name].name for name in alone)
        raise ValueError(
            f"{len(alone)} videos have no partner of the same name in the other folder, e.g. {first} "
            f"({len(sides[0])} real, {len(sides[1])} fake): pairs have equal names"
        )
    return [(sides[0][name], sides[1][name]) for name in sides[0]]


def read_pair(
    pair: tuple, num_frames: int | None, size: tuple[int, int] | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pixels of a pair, some frames at a time, (T, H, W, 3) uint8 each: as stored, or both at `size`.

    num_frames: the first N, None for all. Raises ValueError if the two differ in frames or size.
    """
    # The two must have one shape, once frames and size are as asked for.
    shapes = [videos.shape_of(video) for video in pair]
    compared = [(num_frames or frames, *(size or stored)) for frames, *stored in shapes]
    if compared[0] != compared[1]:
        raise ValueError(
            f"{pair[0].name}: real is {shapes[0]}, {pair[1].name}: fake is {shapes[1]} (frames, height, width); "
            "--num-frames and --size bring both to one shape"
        )
    if num_frames is not None and num_frames > min(shape[0] for shape in shapes):
        raise ValueError(
            f"{pair[0].name}: --num-frames {num_frames}, the videos have {shapes[0][0]}, {shapes[1][0]}"
        )
    # A few frames at a time, so that memory does not grow with the video.
    total, block = compared[0][0], max(1, videos.BLOCK_BYTES // max(3 * H * W for _, H, W in shapes))
    for start in range(0, total, block):
        indices = np.arange(start, min(start + block, total))
        sides = [videos.read_video(video, indices) for video in pair]
        yield tuple(videos.fit(side, *size) if size else side for side in sides)


def measure_pair(blocks: Iterable[tuple[np.ndarray, np.ndarray]], network=None) -> dict[FrameMetric, float]:
    """Measure each metric (`measures`) of a pair: means over all frames of its blocks."""
    metrics = measures(network)
    # Each block counts by its frames.
    sums, frames = dict.fromkeys(metrics, 0.0), 0
    for real, fake in blocks:
        for metric, measure in metrics.items():
            sums[metric] += len(real) * measure(real, fake)
        frames += len(real)
    return {metric: total / frames for metric, total in sums.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="PSNR, SSIM and LPIPS of reconstructed videos against originals"
    )
    for side in ("real", "fake"):
        parser.add_argument(
            f"--{side}", required=True, help="folder of videos, pairs by name, or an .npy/.npz file"
        )
    parser.add_argument("--num-frames", type=int, help="compare the first frames only (default: all)")
    parser.add_argument(
        "--size", type=size_argument, help="scale and crop both to 256 or 144x176 (default: as stored)"
    )
    parser.add_argument("--no-lpips", action="store_true", help="PSNR and SSIM only: needs no weights")
    parser.add_argument(
        "--weights", help="AlexNet file or folder (default $OMNILATTE_WEIGHTS), or random:SEED"
    )
    parser.add_argument("--device", help="for LPIPS; default: cuda if there is one")
    parser.add_argument("--out", help="append one record per metric to this JSONL file")
    parser.add_argument("--tag", default="", help="what was judged, for the report, e.g. webvid-10m/OD-VAE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv)
    if args.num_frames is not None and args.num_frames < 1:
        raise ValueError(f"--num-frames {args.num_frames}: at least 1")
    if not args.no_lpips:
        require_weights("alexnet", args.weights)
    if args.out:
        claim_file(args.out, is_json_object)
    device = features.device_of(args.device)

    # Pairs and judge, then each pair frame by frame; means over a video, then over videos.
    pairs = pair_videos(args.real, args.fake)
    network, provenance = (None, None) if args.no_lpips else load_lpips(args.weights, device)
    measured = []
    with Progress(len(pairs), "pairs", "pair") as bar:
        for pair in pairs:
            measured.append(measure_pair(read_pair(pair, args.num_frames, args.size), network))
            bar.update()
    values = {metric: [found[metric] for found in measured] for metric in measured[0]}
    report(values, pairs, provenance, device, args)


def report(
    values: dict[FrameMetric, list[float]], pairs: list[tuple], provenance, device, args: argparse.Namespace
) -> None:
    """Print the means and append the records."""
    made = records.environment(records.device_name(device)) if args.out else {}
    # What was compared: how each side is stored, and a digest of its files.
    storage, digests = {}, {}
    for side, files in zip(("real", "fake"), zip(*pairs, strict=True), strict=True):
        storage[side] = sorted(set(map(videos.storage_of, files)))
        lines = [f"{video.name}\t{videos.content_digest(video)}" for video in files]
        digests[side] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    # The means, and a record for each.
    for metric, numbers in values.items():
        name = provenance.metric_name(metric.name) if metric.network else metric.name
        unit = f" {metric.unit}" if metric.unit else ""
        print(f"{name} {np.mean(numbers):.4f}{unit}  ({len(numbers)} videos)")
        if args.out:
            record = {
                "metric": name,
                "value": float(np.mean(numbers)),
                "per_video": {p[1].name: v for p, v in zip(pairs, numbers, strict=True)},
                "protocol": {"num_frames": args.num_frames, "size": args.size, "num_videos": len(pairs)},
                "storage": storage,
                "files_sha256": digests,
                "tag": args.tag,
                "dtype": "float32" if metric.network else "float64",
                "weights": provenance.as_dict() if metric.network else None,
            }
            records.append_record(args.out, {**record, **made})
    for side, kinds in storage.items():
        if "lossy" in kinds:
            print(f"note: {side} videos are stored with loss: this lowers PSNR and SSIM by itself")


if __name__ == "__main__":
    run(main)
