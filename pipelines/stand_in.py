"""Make a stand-in for what a machine lacks: a VAE with random weights, or a folder of moving scenes.

    python -m pipelines.stand_in odvae variant=2 --out DIR
    python -m pipelines.stand_in videos count=8 size=32 --out DIR

A random VAE takes the time and memory of a trained one. Its output is noise: no score of it means anything.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from data.core.cli import run
from data.core.files import read_json, write_json
from data.core.lazy import lazy
from data.demo import EDGE
from vae.registry import list_vaes

torch = lazy("torch")
vae = lazy("vae")
videos = lazy("data.demo")
encode = lazy("data.encode")
folder = lazy("pipelines.training.folder")
MARK = "stand_in.json"


def setting(text: str) -> tuple[str, Any]:
    """Split key=value; the value is read as JSON if it is JSON, else it stays text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: settings are written key=value, e.g. variant=2")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def random_vae(out: Path, name: str, seed: int = 0, **settings: Any) -> None:
    """Save a VAE of that family with random weights. settings: its config; odvae takes `preset` and `variant` too."""
    torch.manual_seed(seed)
    values = dict(settings)
    for key, value in values.items():
        values[key] = tuple(value) if isinstance(value, list) else value
    if name == "odvae":
        model = vae.ODVAE.preset(values.pop("preset", "odvae"), **values)
    else:
        model = vae.build_vae(name, **values)
    model.save_pretrained(out)


def demo_videos(
    out: Path,
    count: int = 8,
    size: int = 32,
    num_frames: int = 33,
    classes: int = 4,
    seed: int = 0,
    edge: float = EDGE,
) -> None:
    """Write lossless files of procedural scenes, one folder per class; video n is the same in every call."""
    demo = videos.DemoVideos(count, classes, size, num_frames, seed, edge)
    for n in range(count):
        file = out / demo.class_names[demo.label(n)] / f"{n:05d}.mkv"
        file.parent.mkdir(parents=True, exist_ok=True)
        encode.write_ffv1(file, demo.frames(n, range(num_frames)), 8)


def files_of(out: Path) -> list[str]:
    """The paths of all files below a folder, seen from there."""
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())


def config_from(argv: list[str] | None) -> argparse.Namespace:
    """The command line, read."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.stand_in",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=["videos", *list_vaes()], help="what to make")
    parser.add_argument("--out", type=Path, required=True, help="folder; replaced if it is a stand-in")
    known = "videos: count, size, num_frames, classes, seed, edge; a VAE: its config, and seed"
    parser.add_argument("settings", nargs="*", metavar="key=value", help=known)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = config_from(argv)
    # A folder may be replaced if this program made all that is in it.
    if args.out.exists() and not (args.out / MARK).is_file():
        raise ValueError(f"--out {args.out}: exists and is not a stand-in; choose another folder")
    ours = read_json(args.out / MARK).get("files") if args.out.exists() else None
    if ours is not None and (more := sorted(set(files_of(args.out)) - set(ours))):
        raise ValueError(f"--out {args.out}: {more[0]} was added and would be lost; choose another folder")
    settings = dict(map(setting, args.settings))

    # Made beside its place and renamed: whole or absent.
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if args.kind == "videos":
            demo_videos(temporary, **settings)
        else:
            random_vae(temporary, args.kind, **settings)
    except TypeError as error:
        raise ValueError(f"{args.kind}: {error}") from error

    # A record of what it is, for the next call and for the tables.
    about = {"kind": args.kind, "settings": settings, "versions": folder.versions()}
    write_json(temporary / MARK, about | {"files": [MARK, *files_of(temporary)]})
    if args.out.exists():
        shutil.rmtree(args.out)
    os.replace(temporary, args.out)
    return 0


if __name__ == "__main__":
    run(main)
