"""Stand-ins for what a machine lacks: a VAE with random weights, a folder of moving scenes. For timing and for trials.

    python -m pipelines.stand_in vae odvae variant=2 --out DIR
    python -m pipelines.stand_in videos --out DIR --count 8 --size 32

A random VAE takes the time and memory of a trained one and makes noise: no score of it means anything.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from data.core.cli import run
from vae.registry import list_vaes


def setting(text: str) -> tuple[str, Any]:
    """key=value, the value as JSON or, if it is none, as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: settings are written key=value, e.g. variant=2")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def random_vae(name: str, out: Path, seed: int, settings: dict[str, Any]) -> None:
    """Save a VAE of that family with random weights. settings: of its config; odvae takes `preset` and `variant` too.

    Raises ValueError for a setting that the family does not have.
    """
    import torch

    from vae import ODVAE, build_vae

    torch.manual_seed(seed)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        if name == "odvae":
            model = ODVAE.preset(values.pop("preset", "odvae"), **values)
        else:
            model = build_vae(name, **values)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    model.save_pretrained(out)


def demo_videos(out: Path, count: int, size: int, num_frames: int, classes: int) -> None:
    """Lossless files of the procedural scenes, a folder a class; video n is the same in every call."""
    from data.demo import DemoVideos
    from data.encode import write_ffv1

    demo = DemoVideos(count, classes, size, num_frames)
    for n in range(count):
        file = out / demo.class_names[demo.label(n)] / f"{n:05d}.mkv"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_ffv1(file, demo.frames(n, range(num_frames)), 8)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.stand_in",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    model = kinds.add_parser("vae", help="a VAE with random weights, as a diffusers folder")
    model.add_argument("name", choices=list_vaes())
    model.add_argument("settings", nargs="*", metavar="key=value", help="of its config, e.g. variant=2")
    model.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    videos = kinds.add_parser("videos", help="moving scenes, one folder a class, FFV1")
    videos.add_argument("--count", type=int, default=8, help="videos (8)")
    videos.add_argument("--size", type=int, default=32, help="side in pixels (32)")
    videos.add_argument("--num-frames", type=int, default=33, help="of each (33)")
    videos.add_argument("--classes", type=int, default=4, help="1 to 8 motions (4)")
    for kind in (model, videos):
        kind.add_argument("--out", type=Path, required=True, help="folder, made anew")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.out.exists() and not (args.out / "stand_in.json").is_file():
        raise ValueError(f"--out {args.out}: exists and is no stand-in; choose another folder")
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if args.kind == "vae":
        random_vae(args.name, temporary, args.seed, dict(map(setting, args.settings)))
    else:
        demo_videos(temporary, args.count, args.size, args.num_frames, args.classes)
    from data.core.files import write_json
    from pipelines.training.folder import versions

    made = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_json(temporary / "stand_in.json", {**made, "versions": versions()})
    if args.out.exists():
        shutil.rmtree(args.out)
    os.replace(temporary, args.out)
    return 0


if __name__ == "__main__":
    run(main)
