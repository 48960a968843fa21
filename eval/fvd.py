"""Frechet Video Distance and Kernel Video Distance: a program over two folders, and functions on clips.

    python eval/fvd.py --real DIR --fake DIR [--protocol tats/fvd2048_16f]
    torchrun --nproc-per-node 4 eval/fvd.py --real DIR --fake DIR      # the same numbers

FVD and KVD compare the 400 logits of I3D on real and generated clips (Unterthiner et al., 2018). Every knob
is in `eval.protocol.Protocol` and goes into the record, with an interval and the floor of real against real.
"""

import argparse
import logging
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from data.core.cli import run
from data.core.lazy import lazy
from eval.options import add_knobs, add_run_arguments, knobs_of, run_options, selection_of, side_notes
from eval.protocol import MAX_FRAMES, PROTOCOLS, Protocol, named_protocol
from eval.weights import require_weights

extraction = lazy("eval.extraction")
feature_networks = lazy("eval.features")
measures = lazy("eval.measures")
records = lazy("eval.records")

logger = logging.getLogger(__name__)
# With fewer, the bias of two samples of one distribution shows: about 6 at 2,048 videos, 26 at 512.
RELIABLE_VIDEOS = 2048


def distances(real: np.ndarray, fake: np.ndarray, ddof: int = 1) -> dict[str, float]:
    """Compute {"FVD": ..., "KVD": ...} of two feature arrays (N, 400) of equal N, else ValueError."""
    if len(real) != len(fake):
        raise ValueError(
            f"{len(real)} real and {len(fake)} fake clips: compare equal numbers, the bias depends on N"
        )
    return {"FVD": measures.frechet_distance(real, fake, ddof), "KVD": measures.kernel_distance(real, fake)}


def fvd_of_clips(
    real: Iterable[np.ndarray], fake: Iterable[np.ndarray], extractor=None, ddof: int = 1, batch_size: int = 8
) -> dict[str, float]:
    """Compute FVD and KVD of clips in memory: iterables of (T, H, W, 3) uint8, as many real as fake.

    extractor: `eval.features.i3d_extractor(...)`, default the weights of $OMNILATTE_WEIGHTS. The keys carry
    the label of random weights: {"random-feature FVD (I3D, seed 0)": ...}.
    """
    extractor = extractor if extractor is not None else feature_networks.i3d_extractor()
    real_features = feature_networks.extract_features(real, extractor, batch_size)
    fake_features = feature_networks.extract_features(fake, extractor, batch_size)
    values = distances(real_features, fake_features, ddof)
    return {extractor.provenance.metric_name(metric): value for metric, value in values.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="FVD and KVD of generated videos against real ones; knobs not given are the protocol's"
    )
    # The two sides and the named protocol.
    for side in ("real", "fake"):
        parser.add_argument(
            f"--{side}", required=True, help="folder of videos, at any depth, or an .npy/.npz file"
        )
    parser.add_argument(
        "--protocol",
        default="omnilatte",
        help=f"{', '.join(PROTOCOLS)}, or with a score: tats/fvd2048_16f_step3 (default omnilatte)",
    )
    add_knobs(parser, Protocol)
    # What the number is compared with, and the options of every judge.
    parser.add_argument(
        "--floor",
        choices=("full", "half"),
        default="full",
        help="real against real: at the same N, from as many more real clips if there are (default), or half against half",
    )
    add_run_arguments(parser)
    return parser.parse_args(argv)


def protocol_of(args: argparse.Namespace) -> Protocol:
    """Choose the named protocol, with the knobs of the command line."""
    return named_protocol(args.protocol, **knobs_of(args, Protocol))


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv)
    protocol = protocol_of(args)
    require_weights("i3d", args.weights)

    with extraction.joined_ranks() as ranks:
        options = run_options(args, ranks, args.real, args.fake)
        # Clips: a seeded order of each folder; the size is that of the generated videos unless one is asked for.
        fake = selection_of(args.fake, protocol, protocol.fake_interval, options)
        real = selection_of(args.real, protocol, protocol.real_interval, options, protocol.real_fps)
        selections = {"fake": fake, "real": real}
        size = ranks.from_main(lambda: protocol.size or selections["fake"].first_shape())
        protocol = replace(protocol, size=tuple(size))
        # Features: the same network over exactly num_videos clips of each side, more real ones for the floor.
        device = feature_networks.device_of(args.device, ranks.rank)
        extractor = feature_networks.i3d_extractor(args.weights, device, protocol.eps, protocol.resize)
        judged = {}
        for side, selection in selections.items():
            more = protocol.num_videos if side == "real" and args.floor == "full" else 0
            judged[side] = extraction.judge_folder(
                selection, protocol.num_videos, protocol.size, extractor, options, more, side
            )
        # Distances, intervals and floor; printed, and appended to the record.
        if ranks.main:
            report(
                score(judged["real"], judged["fake"], protocol), protocol, extractor, judged, options, args
            )


def score(real, fake, protocol: Protocol) -> dict[str, dict]:
    """Compute {"FVD": {"value", "interval", "floor"}, "KVD": ...} of two `eval.extraction.Judged`.

    real may hold clips beyond the first num_videos: they are for the floor only.
    """
    # The value, of exactly num_videos clips of each side.
    num = protocol.num_videos
    sides = (real.features[:num], fake.features, real.groups[:num], fake.groups)
    values = distances(*sides[:2], protocol.ddof)
    # How sure it is, and what real clips get against other real ones.
    intervals = {
        "FVD": measures.frechet_interval(*sides, values["FVD"], protocol.ddof, protocol.seed),
        "KVD": measures.kernel_interval(*sides, values["KVD"], protocol.seed),
    }
    floor = measures.same_distribution_floor(
        real.features, num, lambda a, b: distances(a, b, protocol.ddof), real.groups
    )
    scores = {}
    for metric, value in values.items():
        scores[metric] = {"value": value, "interval": intervals[metric], "floor": None}
        if floor:
            of_metric = {key: floor[key] for key in ("num_videos", "same_num_videos")}
            scores[metric]["floor"] = {"value": floor["values"][metric], **of_metric}
    return scores


def report(scores: dict[str, dict], protocol: Protocol, extractor, judged, options, args) -> None:
    """Print the numbers with their protocol, interval and floor, and append the records."""
    sides = {side: judged[side].summary for side in ("real", "fake")}
    made = records.provenance_of_run(extractor, options, args.tag) if args.out else {}
    for metric, found in scores.items():
        name, label = extractor.provenance.metric_name(metric), protocol.label(metric.lower())
        low, high = found["interval"]["low"], found["interval"]["high"]
        print(
            f"{name} {found['value']:.4f}  95 % [{low:.4f}, {high:.4f}]  ({label}, protocol {protocol.title()}, "
            f"seed {protocol.seed}, {protocol.size[0]}x{protocol.size[1]} px)"
        )
        print(f"  floor, real against real: {floor_text(found['floor'])}")
        if args.out:
            record = {"metric": name, "label": label, **found, "protocol": protocol.as_dict(), **sides}
            records.append_record(args.out, {**record, **made})
    for line in notes(protocol, sides):
        print(line)


def floor_text(floor: dict | None) -> str:
    """Say a floor in words: its value, its N, and whether that is the N of the number beside it."""
    if floor is None:
        return "not run (fewer than 4 real clips)"
    at = "the same N" if floor["same_num_videos"] else "fewer clips than the number's, so a larger bias"
    return f"{floor['value']:.4f} at N = {floor['num_videos']} ({at})"


def notes(protocol: Protocol, sides: dict[str, dict]) -> list[str]:
    """List what a reader of the numbers has to know: counts, and what weakens the comparison."""
    lines = []
    for side, counts in sides.items():
        lines += side_notes(side, counts, protocol.size)
    # Frames of the generated videos that no clip covers.
    covered = (protocol.num_frames - 1) * protocol.fake_interval + 1
    if longer := {int(frames) for frames in sides["fake"]["frames"]} - {covered}:
        lines.append(
            f"note: fake videos have up to {max(longer)} frames, clips cover {covered} of them (position "
            f"{protocol.position}); --num-frames {min(max(longer), MAX_FRAMES)} judges more"
        )
    # Differences between the sides, and too few clips.
    if sides["real"]["storage"] != sides["fake"]["storage"]:
        lines.append(
            "note: one side is stored with loss and the other not: part of the distance is compression"
        )
    if protocol.num_videos < RELIABLE_VIDEOS:
        lines.append(
            f"note: N = {protocol.num_videos} < {RELIABLE_VIDEOS}: FVD is biased upwards, compare at equal N"
        )
    return lines


if __name__ == "__main__":
    run(main)
