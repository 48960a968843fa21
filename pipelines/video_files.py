"""Video files through a VAE: what pipelines.reconstruct (IN OUT), pipelines.encode and pipelines.decode have in common."""

import argparse
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data.core.files import claim_folder, read_json, remove_leftovers, usual_mode, write_json
from data.core.lazy import lazy
from data.decoder import reading
from data.encode import Clock, atomic_path, writing_video
from data.finding import VIDEO_SUFFIXES, video_names
from data.progress import Progress
from data.timeline import rising
from data.video import VideoInfo, iterate_frames, probe
from eval import fidelity
from eval.weights import score_name
from pipelines.training.log import box, command

torch = lazy("torch")
clips = lazy("vae.clips")
features = lazy("eval.features")
openers = lazy("pipelines.training.open")
safetensors = lazy("safetensors")
safetensors_torch = lazy("safetensors.torch")
trainer = lazy("pipelines.training.trainer")
vaes = lazy("vae")

log = logging.getLogger(__name__)
FALLBACK_FPS = 8.0  # of a folder of frames, which has no rate


def parser(program: str, doc: str, given: str, made: str) -> argparse.ArgumentParser:
    """The arguments that all three programs take."""
    made_by = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(
        prog=f"python -m pipelines.{program}", description=doc, formatter_class=made_by
    )
    add = found.add_argument
    add("given", type=Path, metavar="IN", help=given)
    add("out", type=Path, metavar="OUT", help=made)
    add("--vae", default="odvae", help="name of the VAE, for its folder in $OMNILATTE_WEIGHTS")
    add("--vae-path", type=Path, metavar="DIR", help="folder of the VAE, in place of the name")
    add("--device", default="", help="cuda, cuda:1, cpu; empty: a GPU if there is one")
    add("--bf16", action="store_true", help="compute in bfloat16")
    return found


def open_vae(args: argparse.Namespace) -> tuple[Any, str]:
    """The VAE, frozen, on its device, and the digest of its weights. ValueError where torchrun starts several processes."""
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"WORLD_SIZE={world}: all would write the same files; for several GPUs start one process each, "
            "with --device cuda:N and a folder of videos of its own"
        )
    vae = vaes.load_vae(args.vae_path or args.vae).requires_grad_(False)
    device = features.device_of(args.device)
    digest = openers.weights_digest(vae)  # of the weights as they are stored
    return (vae.bfloat16() if args.bf16 else vae).to(device), digest


def pairs(
    given: Path, out: Path, suffix: str, kinds: tuple[str, ...], program: str, settings: dict
) -> list[tuple]:
    """(input, output) of one file, or of every file of a folder that is not done yet.

    A folder OUT belongs to the program and to its settings (the VAE's digest); what is complete in it stays.
    Raises ValueError for a file that is there already, and where there is nothing to do it with.
    """
    # One file, or one folder of frames.
    if given.is_file() or (given.is_dir() and out.suffix in {suffix, *VIDEO_SUFFIXES}):  # a folder of frames
        if out.exists():
            raise ValueError(f"{out}: there already; choose another name")
        return [(given, out)]
    if not given.is_dir():
        raise ValueError(f"{given}: no such file or folder")
    if out.resolve() == given.resolve() or out.resolve().is_relative_to(given.resolve()):
        raise ValueError(f"{out}: lies in {given}; choose a folder of its own")
    # The files of a folder, and the name that each result will have.
    if kinds == (".safetensors",):
        names = sorted(p.relative_to(given).as_posix() for p in given.rglob("*.safetensors"))
        names = [name for name in names if not Path(name).name.startswith(".")]  # half written
    else:
        names = video_names(given)
    if not names:
        raise ValueError(f"{given}: no {', '.join(kinds)} files in it")
    inputs: dict[Path, list[str]] = {}  # of each output
    for name in names:
        named = given.resolve().name if name == "." else name  # IN itself is a folder of frames
        stem = Path(named).with_suffix("") if named.lower().endswith(kinds) else named  # a dot may be its own
        inputs.setdefault(out / f"{stem}{suffix}", []).append(name)
    # Two inputs must not become one file.
    for same in inputs.values():
        if len(same) > 1:
            raise ValueError(f"{given}: {', '.join(same[:4])} would be one file in {out}; rename them")
    # The folder OUT is of this program and of these settings.
    claim_folder(out, program)
    file = out / "settings.json"
    if file.is_file() and read_json(file) != settings:
        raise ValueError(f"{out}: made with other settings ({file}); choose another folder")
    write_json(file, settings)
    for folder in {target.parent for target in inputs}:
        remove_leftovers(folder)
    # What is complete stays.
    todo = [(given / name, target) for target, (name,) in inputs.items() if not target.exists()]
    if len(todo) < len(inputs):
        log.info("%s: %d of %d are there already", out, len(inputs) - len(todo), len(inputs))
    return todo


@contextmanager
def _memory() -> Iterator[None]:
    """Too little memory as ValueError: a smaller video may fit."""
    try:
        yield
    except RuntimeError as error:
        if not trainer.lacks_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        way_out = "a smaller --window (encode, reconstruct; not for a streamed VAE), --bf16 or smaller frames"
        raise ValueError(f"{reason}; use {way_out}") from error


def each(todo: list[tuple], program: str, work: Callable[[Path, Path], str]) -> list[tuple[Path, str]]:
    """Work on every pair; returns those that cannot be done, with the reason. One alone raises it, as ValueError.

    Any other error, as of a full disk, would meet the next video too and ends the work.
    """
    bad: list[tuple[Path, str]] = []
    bar = Progress(len(todo), program, "video", len(todo) > 1)
    # Each video reads or fails alone; the reason is kept for the summary.
    for given, out in todo:
        try:
            with _memory():
                print(work(given, out), flush=True)
        except ValueError as error:
            if len(todo) == 1:
                raise
            bad.append((given, str(error)))
            log.warning("left out: %s: %s", given, error)
        bar.update()
    bar.close()
    if bad:
        print(f"{len(bad)} of {len(todo)} could not be done: {', '.join(given.name for given, _ in bad)}")
    return bad


def end(args: argparse.Namespace, todo: list[tuple], bad: list, next_command: str = "") -> int:
    """Say what was done, where it is and how to go on; returns the exit code."""
    rows = {"in": str(args.out)} | ({"next": next_command} if next_command else {})
    box(f"finished: {len(todo) - len(bad)} of {len(todo)} videos", rows)
    return 1 if bad else 0


def of_vae(args: argparse.Namespace) -> list[str]:
    """The words by which another program opens the same VAE."""
    return ["--vae-path", str(args.vae_path)] if args.vae_path else ["--vae", args.vae]


# ---- reconstruct -----------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Sums of per-frame scores of one video. network, weights: LPIPS and its provenance; None: not run, for this reason."""

    network: Any = None
    weights: dict[str, Any] | None = None
    why_not: str = ""
    sums: dict[fidelity.FrameMetric, float] = field(default_factory=dict)
    count: int = 0

    def add(self, original: np.ndarray, decoded: np.ndarray) -> None:
        """Two uint8 pieces (n, H, W, 3)."""
        for a, b in zip(original, decoded, strict=True):
            for metric, measure in fidelity.measures(self.network).items():
                self.sums[metric] = self.sums.get(metric, 0.0) + measure(a[None], b[None])
            self.count += 1

    def words(self) -> str:
        parts = []
        for metric, total in self.sums.items():
            name = score_name(metric.name, self.weights if metric.network else None)
            parts.append(f"{name} {metric.text(total / self.count)}")
        if self.network is None:
            parts.append(f"LPIPS not run ({self.why_not})")
        return ", ".join(parts)


def load_judge(weights: str, device: Any) -> Judge:
    """With LPIPS where its weights are."""
    try:
        network, found = fidelity.load_lpips(weights or None, device)
    except ValueError:
        if weights:
            raise
        return Judge(why_not="no AlexNet weights here: bash scripts/fetch_weights.sh")
    return Judge(network, found.as_dict())


def reconstruct_file(vae: Any, given: Path, out: Path, judge: Judge, audio: bool, window: int) -> str:
    """Write the reconstruction of a video at its own size, rate and length; returns a line with the scores."""
    # What the judge can measure of frames of this size.
    info = probe(given)
    judge = Judge(judge.network, judge.weights, judge.why_not)
    try:
        fidelity.check_lpips_size(info.height, info.width)
    except ValueError:
        judge.network, judge.why_not = None, "frames too small"
    # Frames that the encoder has taken wait here for their reconstruction.
    window, waiting = clips.window_of(vae, window), []
    sound = given if audio and given.is_file() else None

    def incoming() -> Iterator[np.ndarray]:
        for frame in iterate_frames(given):
            waiting.append(frame)
            yield frame

    # Frames flow through encoder, decoder, judge and file; only those of a piece are in memory.
    latents = clips.encode_frames(vae, incoming(), window)
    with (
        torch.inference_mode(),
        writing_video(out, info.height, info.width, info.fps or FALLBACK_FPS, sound, info.clock) as write,
    ):
        for decoded in clips.decode_frames(vae, latents, window):
            count = min(len(decoded), len(waiting))  # what is more is padding of the last piece
            original = np.stack(waiting[:count]) if count else decoded[:0]
            del waiting[:count]
            if count:
                decoded = decoded[:count, : info.height, : info.width]
                judge.add(original, decoded)
                write(decoded)
        # Complete or an error: as many frames back as went in.
        if waiting or judge.count != info.num_frames:
            raise ValueError(f"{given}: {judge.count} of {info.num_frames} frames came back")
    pieces = f" in pieces of {window} frames" if window and info.num_frames > window else ""
    return f"{given} -> {out}: {frames_line(info)}{pieces}; {judge.words()}"


def frames_line(info: VideoInfo) -> str:
    rate = f"{info.fps:.4g} frames/s" if info.fps else f"no rate, written at {FALLBACK_FPS:g} frames/s"
    rate += " in the mean, each at its own time" if info.clock else ""
    return f"all {info.num_frames} frames of {info.width} x {info.height}, {rate}"


def reconstruct_main(words: list[str], doc: str) -> int:
    """`pipelines.reconstruct IN OUT`."""
    found = parser(
        "reconstruct", doc, "video file, folder of frames, or folder of videos", ".mp4, .mkv or folder"
    )
    found.add_argument("--lossless", action="store_true", help="in a folder OUT: .mkv (FFV1) instead of .mp4")
    found.add_argument("--no-audio", action="store_true", help="leave the sound out instead of copying it")
    window = "frames at once, for a VAE that cannot be streamed"
    found.add_argument("--window", type=int, default=33, metavar="N", help=window)
    found.add_argument("--lpips-weights", default="", help="AlexNet file or folder")
    args = found.parse_args(words)
    # The VAE, the judge, and the files that are not done yet.
    vae, digest = open_vae(args)
    judge = load_judge(args.lpips_weights, vae.device)
    settings = {"vae_sha256": digest, "window": args.window, "bf16": args.bf16}
    suffix = ".mkv" if args.lossless else ".mp4"
    todo = pairs(args.given, args.out, suffix, VIDEO_SUFFIXES, "reconstruct of videos", settings)

    def work(given: Path, out: Path) -> str:
        return reconstruct_file(vae, given, out, judge, not args.no_audio, args.window)

    # What comes next: the latents themselves as files.
    one = args.out.suffix in VIDEO_SUFFIXES
    latents = args.out.with_suffix(".safetensors") if one else f"{args.out}-latents"
    next_command = command("encode", str(args.given), str(latents), *of_vae(args))
    return end(args, todo, each(todo, "reconstruct", work), next_command)


# ---- latents as files ------------------------------------------------------------------------------------


def save_latents(file: Path, video: Any, about: dict[str, Any]) -> None:
    """latents (C, t, h, w) float32 and, as text in the header, what else another project needs to know."""
    geometry = {name: getattr(video, name) for name in ("num_frames", "height", "width", "window")}
    header = {}
    for key, value in (about | geometry).items():
        header[key] = value if isinstance(value, str) else json.dumps(value)
    try:
        with atomic_path(file) as temporary:
            safetensors_torch.save_file({"latents": video.latents.contiguous()}, temporary, metadata=header)
            usual_mode(temporary)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"cannot write {file} ({video.latents.nbytes:,} bytes): {error}") from error


def read_latents(file: Path) -> tuple[Any, dict[str, str]]:
    """VideoLatents and the header. ValueError for a file that pipelines.encode has not written."""
    try:
        with reading(file), safetensors.safe_open(file, "pt") as opened:
            header, latents = opened.metadata() or {}, opened.get_tensor("latents")
        # Numbers of the header that the decoder needs; without them it is somebody else's file.
        numbers = [int(header[name]) for name in ("num_frames", "height", "width", "window")]
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file}: not latents of pipelines.encode ({type(error).__name__}: {error})"
        ) from error
    if latents.ndim != 4 or min(numbers[:3]) < 1 or numbers[3] < 0:
        raise ValueError(
            f"{file}: latents {tuple(latents.shape)} of {numbers}; (C, t, h, w) of a video is needed"
        )
    return clips.VideoLatents(latents.float(), *numbers), header


def clock_of(header: dict[str, str], num_frames: int, file: Path) -> Clock | None:
    """When each frame is shown, as pipelines.encode notes it of a variable rate. ValueError for another number of frames."""
    if "ticks" not in header:
        return None
    try:
        clock = Clock(Fraction(*json.loads(header["tick"])), tuple(map(int, json.loads(header["ticks"]))))
        if len(clock.ticks) != num_frames or not rising(clock.ticks) or clock.base <= 0:
            raise ValueError(f"{len(clock.ticks)} times of {num_frames} frames")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: its time stamps are damaged ({error}); encode the video again") from error
    return clock
