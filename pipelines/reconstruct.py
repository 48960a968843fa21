"""Encode and decode a source with a VAE and measure the loss: PSNR, SSIM, LPIPS in memory (paper, Table 1).

    python -m pipelines.reconstruct --vae odvae --vae-path runs/odvae/vae --data /videos --num-frames 25
    python -m pipelines.reconstruct --vae odvae --vae-path runs/odvae/vae --data /films --stream out=runs/films
    python -m pipelines.reconstruct in.mp4 out.mp4 --vae-path runs/odvae/vae        # or .mkv, or two folders

IN OUT writes the video itself: its own size, rate, length and sound; `in.mp4 out.mp4 --help` has its options. Posterior means, no codec in between, rounded to uint8. --stream takes whole videos of any length in constant memory.
"""

import argparse
import contextlib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.clip import ClipSpec, crop_resize_uint8, to_float, to_uint8
from data.core.cli import run
from data.core.files import claim_folder, read_json, write_atomic, write_json
from data.core.lazy import lazy
from data.core.option import option
from data.decoder import BadVideo
from data.encode import write_mp4
from data.processes import Pool
from data.progress import Progress
from data.video import iterate_frames
from eval import fidelity
from eval.protocol import MIN_FRAMES
from eval.weights import score_name, weights_line
from pipelines import video_files
from pipelines.beside import Beside, Waits
from pipelines.media import comparison
from pipelines.training.config import at_least, free_keys, parse
from pipelines.training.folder import flatten_yaml, refuse_in_data, summary, versions
from pipelines.training.log import box, command
from pipelines.training.settings import SourceConfig, VAEConfig

torch = lazy("torch")
accelerate = lazy("accelerate")
distributed = lazy("pipelines.training.distributed")
features = lazy("eval.features")
measures = lazy("eval.measures")
openers = lazy("pipelines.training.open")
vaes = lazy("vae")

log = logging.getLogger(__name__)
STREAM_CHUNK = 8  # frames handed to the encoder at once; the result does not depend on it


@dataclass
class ReconstructConfig:
    vae: VAEConfig = option(VAEConfig, "")
    source: SourceConfig = option(lambda: SourceConfig(val_fraction=0.0), "")
    clip: ClipSpec = option(lambda: ClipSpec(position="center"), "")
    out: str = option("runs/reconstruct", "folder of videos.jsonl, summary.json and the side-by-side videos")
    num_videos: int = option(0, "first N videos; 0: all")
    stream: bool = option(
        False, "whole videos, frame by frame, instead of one clip of each (od-vae, exact design)"
    )
    whole: bool = option(True, "stream=true: whole videos; false: the clip that is taken without stream")
    held_out: bool = option(False, "only the clips that training holds out (source.val_fraction)")
    lpips: bool = option(True, "measure LPIPS too (AlexNet)")
    lpips_weights: str = option("", "AlexNet file or folder; empty: $OMNILATTE_WEIGHTS or weights/")
    rfvd: bool = option(False, "measure rFVD too: FVD of the reconstructions against the clips (I3D)")
    i3d_weights: str = option("", "I3D file or folder; empty: $OMNILATTE_WEIGHTS or weights/")
    pictures: int = option(4, "side-by-side videos written: original | reconstruction | error x 4")
    seed: int = option(0, "of clip positions, where they are random")
    workers: int = option(4, "processes that read clips ahead; 0: read in turn", free=True)

    def __post_init__(self):
        at_least(self, 0, "num_videos", "pictures", "workers")


def score_frames(
    original: Any, decoded: Any, network: Any, weights: Mapping | None
) -> dict[str, list[float]]:
    """Measure each frame of two uint8 videos (T, H, W, 3): {key of a metric: one score a frame}.

    network: of LPIPS, None leaves its metrics out. weights: its provenance, by which its scores are named.
    """
    return pixel_scores(original, decoded) | network_scores(original, decoded, network, weights)


def _each_frame(original: Any, decoded: Any, measure: Callable[..., float]) -> list[float]:
    return [measure(original[t : t + 1], decoded[t : t + 1]) for t in range(len(original))]


def pixel_scores(original: Any, decoded: Any) -> dict[str, list[float]]:
    """Measure the part of `score_frames` that needs no network."""
    metrics = fidelity.measures()
    return {metric.key: _each_frame(original, decoded, measure) for metric, measure in metrics.items()}


def network_scores(
    original: Any, decoded: Any, network: Any, weights: Mapping | None
) -> dict[str, list[float]]:
    """Measure the other part; {} without a network."""
    found = {}
    for metric, measure in fidelity.measures(network).items():
        if metric.network:
            found[score_name(metric.key, weights)] = _each_frame(original, decoded, measure)
    return found


def rfvd_scores(real: Any, fake: Any, provenance: Any) -> dict[str, Any]:
    """{"rFVD": value, "rFVD_interval": [low, high]} of I3D's features (N, 400), under the name that its weights allow."""
    value, groups = measures.frechet_distance(real, fake), np.arange(len(real))
    interval = measures.frechet_interval(real, fake, groups, groups, value)
    name = provenance.metric_name("rFVD")
    return {name: value, f"{name}_interval": [interval["low"], interval["high"]]}


def read_clips(config: ReconstructConfig, clips: Any, indices: Iterable[int]) -> Iterator[Any]:
    """The clips of these videos, uint8 (T, size, size, 3), decoded ahead by `workers` processes. Raises BadVideo."""

    def jobs() -> Iterator[tuple]:
        for index in indices:
            yield clips.clip_job(index, np.random.default_rng((config.seed, index)))

    # Here, one after the other, or ahead in other processes
    if not config.workers:
        for function, *args in jobs():
            yield function(*args)
        return
    with Pool(config.workers) as pool:
        for clip in pool.in_order(jobs(), 2 * config.workers):
            if isinstance(clip, BadVideo):
                raise clip
            yield clip


def _means(vae: Any, pieces: Iterable[Any]) -> Iterator[Any]:
    """Posterior means of a stream, piece by piece."""
    return (posterior.mode() for posterior in vae.stream_encode(pieces))


def clip_pairs(config: ReconstructConfig, vae: Any, original: Any, device: Any) -> Iterator[tuple[Any, Any]]:
    """One (original, reconstruction) of a clip."""
    x = to_float(distributed.send(torch.from_numpy(original), device))[None]
    if config.stream:
        latents = _means(vae, x.split(STREAM_CHUNK, dim=2))
        decoded = torch.cat(list(vae.stream_decode(latents)), dim=2)
    else:
        decoded = vae(x, sample_posterior=False).sample
    yield original, to_uint8(decoded)[0]


def stream_pairs(vae: Any, clips: Any, index: int, device: Any) -> Iterator[tuple[Any, Any]]:
    """(original, reconstruction) of a few frames at a time; up to three last frames are left out to make T = 4k + 1."""
    # Frames that the encoder has taken wait here for their reconstruction.
    clip = clips.videos[index]
    total = (clip.record.num_frames - 1) // 4 * 4 + 1
    waiting: list[Any] = []

    def incoming() -> Iterator[Any]:
        frames = itertools.islice(iterate_frames(clip.record.path), clip.first, clip.first + total)
        while batch := list(itertools.islice(frames, STREAM_CHUNK)):
            pixels = crop_resize_uint8(np.stack(batch), clips.spec, np.random.default_rng(0))
            waiting.extend(pixels)
            yield to_float(pixels)[None].to(device)

    # Each piece that comes back is compared with those that have waited longest.
    for decoded in vae.stream_decode(_means(vae, incoming())):
        done = to_uint8(decoded)[0]
        yield np.stack(waiting[: len(done)]), done
        del waiting[: len(done)]


class VideoScores:
    """Scores of a video as its frames come, and what is shown of it: at most 81 frames."""

    def __init__(self, index: int, show: bool):
        self.index, self.show = index, show
        self.scores: dict[str, list[float]] = {}
        self.shown: list[Any] = []
        self.features: list[Any] = []  # of the clip and of its reconstruction, each (1, 400)

    def add(self, scores: dict[str, list[float]], original: Any, decoded: Any) -> None:
        for name, values in scores.items():
            self.scores.setdefault(name, []).extend(values)
        if self.show and sum(map(len, self.shown)) < 81:
            self.shown.append(comparison(original, decoded))

    def record(self, video: str) -> dict[str, Any]:
        """A line of videos.jsonl."""
        means = {name: float(np.mean(values)) for name, values in self.scores.items()}
        frames = len(next(iter(self.scores.values())))
        return {"index": self.index, "video": video, "frames": frames, **means}


def reconstruct(config: ReconstructConfig) -> dict[str, Any]:
    """Measure; returns the summary. Any number of processes gives the same records."""
    # The VAE, and the networks that judge its output
    accelerator = distributed.make_accelerator()
    vae = vaes.load_vae(config.vae.name, config.vae.path or None).requires_grad_(False).to(accelerator.device)
    prepare(config, vae)
    network = judge = i3d = None
    if config.lpips:
        network, judge = fidelity.load_lpips(config.lpips_weights or None, accelerator.device)
    lpips_weights = judge.as_dict() if judge else None
    if config.rfvd:
        i3d = features.i3d_extractor(config.i3d_weights or None, accelerator.device)

    # The clips: one of each video, or the whole video frame by frame
    whole = config.stream and config.whole
    if whole:
        spec = replace(config.clip, num_frames=1, short="loop", crop="center", flip=False)
    else:
        spec = config.clip
        openers.check_clip(vae, config.clip)
    clips = distributed.open_everywhere(
        accelerator, lambda: openers.open_clips(config.source, spec, config.seed, config.held_out)
    )
    count = min(config.num_videos or len(clips), len(clips))
    if config.rfvd and count < 2:
        raise ValueError(f"rfvd=true: FVD needs 2 clips or more, here is {count}; rfvd=false")

    # The folder of the results, which must be ours
    out = Path(config.out)
    refuse_in_data(out, "out", config.source)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            claim_folder(out, "reconstruct", lambda folder: is_summary(folder / "summary.json"))
            refuse_other(out, openers.weights_digest(vae), config)

    # Each process takes its share. Pixel scores and pictures are made beside the device's work.
    records: list[dict[str, Any]] = []
    judged_features: list[tuple[int, list[Any]]] = []
    mine = range(accelerator.process_index, count, accelerator.num_processes)

    def judge_pair(
        found: VideoScores, original: Any, decoded: Any, distances: dict[str, list[float]]
    ) -> None:
        found.add(pixel_scores(original, decoded) | distances, original, decoded)

    def finish(found: VideoScores) -> None:
        records.append(found.record(clips.name(found.index)))
        judged_features.append((found.index, found.features))
        if found.shown:
            out.mkdir(parents=True, exist_ok=True)
            write_mp4(out / f"{found.index:05d}.mp4", np.concatenate(found.shown), 8)

    waits = Waits()
    with (
        torch.inference_mode(),
        Progress(
            len(mine), "reconstruct", "video", accelerator.is_main_process, note=lambda: str(waits)
        ) as bar,
        Beside(waits, "judging") as beside,
        contextlib.closing(read_clips(config, clips, mine)) as read,
    ):
        for index in mine:
            if whole:
                pairs = stream_pairs(vae, clips, index, accelerator.device)
            else:
                with waits.waiting("videos"):
                    original = next(read)
                pairs = clip_pairs(config, vae, original, accelerator.device)
            found = VideoScores(index, index < config.pictures)
            for original, decoded in pairs:
                # The networks run here: they turn TF32 off for the whole process, so not while the VAE works.
                distances = network_scores(original, decoded, network, lpips_weights)
                if i3d:
                    real = features.extract_features([original], i3d)
                    found.features = [real, features.extract_features([decoded], i3d)]
                beside.do(judge_pair, found, original, decoded, distances)
            beside.do(finish, found)
            bar.update()
    log.info("%s", waits)

    # All records together, in the order of the videos, whoever made them
    records = distributed.gathered(accelerator, records)
    judged_features = distributed.gathered(accelerator, judged_features)
    records.sort(key=lambda record: record["index"])
    judged_features.sort(key=lambda pair: pair[0])

    # The means, and what they were measured with
    summary = {"vae": config.vae.name, "videos": len(records)}
    for name in records[0]:
        if name not in ("index", "video", "frames"):
            summary[name] = float(np.mean([record[name] for record in records]))
    summary |= {
        "params": vae.num_parameters(),
        "weights_sha256": openers.weights_digest(vae),
        "vcpr": vae.spatial_compression_ratio**2 * vae.temporal_compression_ratio,
        "damaged": len(clips.source.damaged),
        "short": len(clips.short),
        "versions": versions(),
    }
    summary |= {"lpips_weights": lpips_weights} if judge else {}
    if accelerator.is_main_process:
        write_atomic(out / "videos.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        if i3d:
            real = np.concatenate([pair[0] for _, pair in judged_features])
            fake = np.concatenate([pair[1] for _, pair in judged_features])
            summary |= rfvd_scores(real, fake, i3d.provenance) | {"i3d_weights": i3d.provenance.as_dict()}
        write_json(out / "summary.json", summary | {"settings": asdict(config)})
    accelerator.wait_for_everyone()
    return summary


def is_summary(file: Path) -> bool:
    """Whether it is the summary of an older run, whose folder has no mark."""
    try:
        return bool(read_json(file, "weights_sha256", "settings"))
    except (OSError, ValueError):
        return False


def _flat(config: ReconstructConfig) -> dict[str, Any]:
    return flatten_yaml(json.loads(json.dumps(asdict(config))))


def refuse_other(out: Path, digest: str, config: ReconstructConfig) -> None:
    """ValueError when the folder holds a measurement of other weights (their digest) or with other settings."""
    if not is_summary(out / "summary.json"):
        return
    before, differing = read_json(out / "summary.json"), []
    if before["weights_sha256"] != digest:
        differing.append(f"weights: {before['weights_sha256'][:12]} -> {digest[:12]}")
    # What an older summary lacks was at its default then.
    old = _flat(ReconstructConfig()) | flatten_yaml(before["settings"])
    if "tiling_frames" in old:  # its name in older summaries
        old["vae.tiling_frames"] = old.pop("tiling_frames")
    # Not where things lie, nor what changes no number; of a plain folder its place is what it is.
    free = {key for key in free_keys(config) if not key.endswith("root")}
    free |= {"out", "pictures", "vae.path", "lpips_weights", "i3d_weights"}
    for key, value in _flat(config).items():
        if key not in free and key in old and old[key] != value:
            differing.append(f"{key}: {old[key]!r} -> {value!r}")
    if differing:
        raise ValueError(
            f"out={out} holds another measurement ({'; '.join(differing[:4])}); choose another out="
        )


def prepare(config: ReconstructConfig, vae: Any) -> None:
    """Tiling and padding as asked for; refuses what the VAE does not have and frames too small for LPIPS."""
    if config.lpips:
        fidelity.check_lpips_size(config.clip.size, config.clip.size)
    if config.stream and config.whole and (config.clip.fps or config.clip.interval != 1):
        raise ValueError(
            f"stream=true takes every frame of a video: leave out clip.fps={config.clip.fps:g} and "
            f"clip.interval={config.clip.interval}, or add whole=false"
        )
    if config.rfvd and config.stream and config.whole:
        raise ValueError("rfvd=true compares clips of one length: with stream=true also whole=false")
    if config.rfvd and config.clip.num_frames < MIN_FRAMES:
        raise ValueError(
            f"rfvd=true, clip.num_frames={config.clip.num_frames}: I3D takes {MIN_FRAMES} frames or more"
        )
    if config.stream and config.vae.name != "odvae":
        raise ValueError(f"vae.name={config.vae.name}: stream=true is for odvae")
    if config.stream and config.vae.tiling_frames:
        raise ValueError("stream=true is exact and needs no vae.tiling_frames; choose one")
    openers.tile_time(vae, config.vae.tiling_frames, "vae.tiling_frames")
    if vae.frame_rule == "4n" and not config.stream:
        vae.enable_frame_padding()  # the last frame repeated, cut off again after decoding


def scores_of(summary: dict[str, Any]) -> dict[fidelity.FrameMetric, tuple[str, float | None]]:
    """Map each frame metric to (the name that it may have, its value in a summary.json or None)."""
    found = {}
    for metric in fidelity.METRICS:
        weights = summary.get("lpips_weights") if metric.network else None
        key = score_name(metric.key, weights)  # older records have the plain key for random weights too
        found[metric] = score_name(metric.name, weights), summary.get(key, summary.get(metric.key))
    return found


def row(summary: dict[str, Any]) -> str:
    """The summary in the form of Table 1."""
    head = f"{'Method':8} {'VCPR':>5} {'Params':>12} {'N':>6}"
    line = f"{summary['vae']:8} {summary['vcpr']:5d} {summary['params']:12,d} {summary['videos']:6d}"
    for metric, (name, value) in scores_of(summary).items():
        width = max(7, len(name))
        head += f" {name:>{width}}"
        line += f" {'not run' if value is None else metric.text(value):>{width}}"
    more = ""
    for score, value in summary.items():
        if "rFVD" in score and not score.endswith("_interval"):
            low, high = summary[f"{score}_interval"]
            more += f"\n{score}: {value:.1f}, 95 % [{low:.1f}, {high:.1f}]"
    return f"{head}\n{line}{more}"


FLAGS = {
    "--vae": "vae.name",
    "--vae-path": "vae.path",
    "--data": "source.root",
    "--dataset": "source.name",
    "--num-frames": "clip.num_frames",
}


def config_from(argv: list[str] | None) -> tuple[ReconstructConfig, argparse.Namespace]:
    """The settings of a command line, and its switches."""
    switches = {"--stream": "same as stream=true"}
    config, args = parse(ReconstructConfig, argv, "reconstruct", __doc__, FLAGS, switches)
    config.stream |= args.stream
    return config, args


def names_files(words: list[str]) -> bool:
    """Whether a command line gives files, IN OUT, in place of a source."""
    taken = ("-", *FLAGS, "--config")
    after = zip(["", *words], words, strict=False)
    return any(not w.startswith("-") and "=" not in w and before not in taken for before, w in after)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if names_files(words):
        return video_files.reconstruct_main(words, __doc__)
    config, args = config_from(argv)
    if args.dry_run:
        print(summary(config))
        if config.rfvd:
            print(f"\nI3D: {weights_line('i3d', config.i3d_weights or None)}")
        if config.lpips:
            print(f"\nLPIPS (alex): {weights_line('alexnet', config.lpips_weights or None)}")
        return 0
    found = reconstruct(config)
    if accelerate.PartialState().is_main_process:
        print(row(found))
        scores = f"{config.out}/summary.json"
        rows = {"scores": f"{config.out}/videos.jsonl, {scores}", "pictures": config.out}
        if model := config.vae.path:
            rows["next"] = command("export", model, "--out", f"share/{config.vae.name}", "--records", scores)
        box(f"finished: {found['videos']} videos", rows)
    return 0


if __name__ == "__main__":
    run(main)
