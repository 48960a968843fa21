"""Inception Score of videos with C3D (Saito et al., TGAN2).

    python eval/inception_score.py --fake DIR [--protocol tgan2]

IS = exp(mean_i KL(p(c | x_i) || p(c))) over 101 classes of UCF101. The value depends strongly on N and on the
number of splits (10 splits of 2,048 videos read up to 20 % lower than 1): both are part of its name.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from data.core.cli import run
from data.core.lazy import lazy
from eval.options import add_knobs, add_run_arguments, knobs_of, run_options, selection_of, side_notes
from eval.protocol import INCEPTION_PROTOCOLS, InceptionProtocol
from eval.weights import require_weights

extraction = lazy("eval.extraction")
features = lazy("eval.features")
measures = lazy("eval.measures")
records = lazy("eval.records")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Inception Score of generated videos with C3D on UCF101; knobs not given are the protocol's"
    )
    parser.add_argument("--fake", required=True, help="folder of videos, at any depth, or an .npy/.npz file")
    parser.add_argument(
        "--protocol", choices=INCEPTION_PROTOCOLS, help="default: both, each with a record of its own"
    )
    add_knobs(parser, InceptionProtocol)
    add_run_arguments(parser)
    return parser.parse_args(argv)


def protocols_of(args: argparse.Namespace) -> list[InceptionProtocol]:
    """Choose the named protocol, or all of them; with the knobs of the command line."""
    knobs = knobs_of(args, InceptionProtocol)
    # The protocols differ in their splits: with those given, one is left.
    chosen = list(INCEPTION_PROTOCOLS) if args.splits is None else ["tgan2"]
    chosen = [args.protocol] if args.protocol else chosen
    return [replace(INCEPTION_PROTOCOLS[name], **knobs) for name in chosen]


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv)
    protocols = protocols_of(args)
    require_weights("c3d", args.weights)

    with extraction.joined_ranks() as ranks:
        # Clips: the same for all protocols, which differ only in how the set is split.
        options = run_options(args, ranks, args.fake)
        first = protocols[0]
        selection = selection_of(args.fake, first, first.interval, options)
        size = tuple(ranks.from_main(lambda: first.size or selection.first_shape()))
        # Logits of C3D over exactly num_videos clips.
        extractor = features.c3d_extractor(args.weights, features.device_of(args.device, ranks.rank))
        judged = extraction.judge_folder(selection, first.num_videos, size, extractor, options, text="fake")
        # A score under each protocol; printed, and appended to the record.
        if ranks.main:
            for protocol in protocols:
                report(judged, replace(protocol, size=size), extractor, options, args)
            for line in side_notes("fake", judged.summary, size):
                print(line)


def report(judged, protocol: InceptionProtocol, extractor, options, args: argparse.Namespace) -> None:
    """Score under one protocol, print it and append the record."""
    # The order decides which videos share a split: that of their names, or shuffled as StyleGAN-V does.
    order = np.argsort(judged.places)
    if protocol.shuffle_seed is not None:
        np.random.RandomState(protocol.shuffle_seed).shuffle(order)
    logits, groups = judged.features[order], judged.groups[order]
    mean, std = measures.inception_score_from_logits(logits, protocol.splits)
    interval = measures.inception_interval(logits, groups, mean, protocol.splits, protocol.seed)
    name = extractor.provenance.metric_name("IS")
    print(
        f"{name} {mean:.4f} ± {std:.4f} over {protocol.splits} split(s)  95 % [{interval['low']:.4f}, "
        f"{interval['high']:.4f}]  ({protocol.label()}, protocol {protocol.title()}, seed {protocol.seed})"
    )
    if args.out:
        record = {
            "metric": name,
            "label": protocol.label(),
            "value": mean,
            "std": std,
            "interval": interval,
            "protocol": {**protocol.as_dict(), "num_frames": protocol.num_frames},
            "fake": judged.summary,
        }
        records.append_record(args.out, {**record, **records.provenance_of_run(extractor, options, args.tag)})


if __name__ == "__main__":
    run(main)
