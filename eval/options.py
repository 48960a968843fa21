"""What the judging programs have in common on their command lines. Imports no torch: `--help` is quick."""

import argparse
import dataclasses
import os
from typing import Any

from data.core.files import claim_file, is_json_object
from eval.extraction import Ranks, RunOptions
from eval.feature_cache import cache_folder, scan_file
from eval.protocol import CHOICES, InceptionProtocol, Protocol, parse_size
from eval.selection import Selection


def size_argument(text: str) -> tuple[int, int]:
    """Read --size, as a type of argparse."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_knobs(parser: argparse.ArgumentParser, kind: type[Protocol | InceptionProtocol]) -> None:
    """Add an option for each knob of a kind of protocol. One that is not given stays as the named protocol has it."""
    for field in dataclasses.fields(kind):
        if field.name == "name":
            continue
        read = int if field.default is None else type(field.default)
        read = float if field.name == "real_fps" else read
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=size_argument if field.name == "size" else read,
            choices=CHOICES.get(field.name),
            help=field.metadata["help"],
        )


def knobs_of(args: argparse.Namespace, kind: type[Protocol | InceptionProtocol]) -> dict[str, Any]:
    """Collect the knobs that the command line gives."""
    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(kind) if field.name != "name"
    }
    return {name: value for name, value in given.items() if value is not None}


def default_workers() -> int:
    """Choose the number of decoding processes: one less than the cores this process may use, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores - 1, 1), 8)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the weights, the machine, the cache and the record."""
    parser.add_argument(
        "--weights", help="file or folder (default $OMNILATTE_WEIGHTS), or random:SEED for a smoke run"
    )
    parser.add_argument("--batch-size", type=int, help="clips at once (default: 128 frames' worth)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="decoding processes")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument(
        "--cache-dir", help="of features and scans (default $OMNILATTE_CACHE or ~/.cache/omnilatte)"
    )
    parser.add_argument("--no-cache", action="store_true", help="keep nothing, read nothing kept")
    parser.add_argument("--out", help="append one record a number to this JSONL file")
    parser.add_argument("--tag", default="", help="what was judged, for the report, e.g. ucf101/OD-VAE")


def run_options(args: argparse.Namespace, ranks: Ranks, *roots: str) -> RunOptions:
    """Make the options of a run; ValueError for a cache inside one of the folders judged."""
    if args.out:
        claim_file(args.out, is_json_object)
    folder = None if args.no_cache else cache_folder(args.cache_dir, *roots)
    return RunOptions(args.batch_size, args.workers, folder, ranks)


def selection_of(root: str, protocol, interval: int, options: RunOptions, fps: float | None = None) -> Any:
    """Open the seeded order of a folder's clips by a protocol, in rank 0; None elsewhere. Errors reach all ranks."""
    selection = None

    def open_folder() -> None:
        nonlocal selection
        scans = scan_file(options.cache, root) if options.cache else None
        knobs = (protocol.sampling, protocol.position, protocol.clips_per_video, protocol.seed)
        selection = Selection(root, protocol.num_frames, interval, *knobs, scans, options.workers, fps)

    options.ranks.from_main(open_folder)  # its result would travel to all: a selection may be large
    return selection


def side_notes(side: str, counts: dict, size: tuple[int, int]) -> list[str]:
    """List what a reader of the number has to know about one side, a line each."""
    lines = [
        f"{side}: {counts['clips']} clips of {counts['videos']} videos ({counts['found']} found, {counts['short']} "
        f"too short, {counts['damaged']} damaged, {counts['stale']} stale, {counts['ignored_files']} other files), "
        f"{counts['storage']}"
    ]
    if side == "fake" and len(counts["sizes"]) > 1:
        lines.append(
            f"note: fake videos differ in size ({counts['sizes']}): all judged at {size[0]}x{size[1]}"
        )
    return lines
