"""A trained model as a folder to share: weights, a model card with its numbers, a few videos.

    python -m pipelines.export runs/odvae --out share/odvae --records runs/reconstruct/summary.json
    python -m pipelines.export runs/latte --out share/latte --samples runs/latte/samples --records scores.jsonl
    python -m pipelines.export runs/latte --out share/latte --push NAME/REPO          # private; --public says otherwise

It loads with ODVAE.from_pretrained or LatentVideoPipeline.from_pretrained. Numbers come from the records that are given;
what is not given is "not measured".
"""

import argparse
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.core.cli import run
from data.core.files import read_json

log = logging.getLogger(__name__)
INDEX = "shared.json"  # names and digests of all files that this program has written
VIDEOS = 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, metavar="RUN_OR_FOLDER", help="run_dir of a training, or a folder of weights"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder, or one this program made"
    )
    parser.add_argument(
        "--samples", type=Path, metavar="DIR", help="videos to show (default: the run's newest preview)"
    )
    parser.add_argument(
        "--records",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="the judges' JSONL, reconstruct's summary.json",
    )
    parser.add_argument(
        "--license", default="other", help="of the weights, as the Hugging Face Hub writes it"
    )
    parser.add_argument(
        "--push", default="", metavar="REPO", help="upload to this repository of the Hugging Face Hub"
    )
    parser.add_argument("--public", action="store_true", help="with --push: make a new repository public")
    return parser.parse_args(argv)


def find_model(given: Path) -> tuple[str, Path, Path | None]:
    """(kind, folder of the weights, folder of the run or None) of what the user named, else ValueError."""
    from pipelines.read_run import is_run

    for folder in (given, given / "pipeline", given / "vae"):
        owner = given if folder != given else given.resolve().parent
        kind = "pipeline" if (folder / "model_index.json").is_file() else "vae"
        if kind == "pipeline" or (folder / "config.json").is_file():
            return kind, folder, owner if is_run(owner) else None
    if is_run(given):
        raise ValueError(
            f"{given}: this run has exported nothing yet, it does so at its end; to take a checkpoint, name a folder like "
            f"{given}/checkpoints/step_00000100/vae_ema"
        )
    raise ValueError(f"{given}: neither a run nor a folder of weights (config.json or model_index.json)")


def load(kind: str, folder: Path) -> Any:
    """The pipeline or the VAE. Raises ValueError when it is neither."""
    from pipelines.video_pipeline import LatentVideoPipeline
    from vae import load_vae

    if kind == "vae":
        return load_vae(folder)
    name = read_json(folder / "model_index.json").get("_class_name")
    if name != "LatentVideoPipeline":
        raise ValueError(f"{folder}: a {name}, not a LatentVideoPipeline")
    return LatentVideoPipeline.from_pretrained(folder)


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Refuses a folder with anything in it that this program did not write, and one that holds an input."""
    from data.core.files import sha256_of

    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out}: {path} lies in it and would be replaced; choose another --out")
    if out.resolve().is_relative_to(inputs[0].resolve()):
        raise ValueError(f"--out {out}: inside the model's own folder; choose another --out")
    if out.is_file():
        raise ValueError(f"--out {out}: a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        known = dict(json.loads((out / INDEX).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"--out {out}: not empty and not made by this program; choose another --out"
        ) from None
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        if name != INDEX and known.get(name) != sha256_of(path):
            raise ValueError(
                f"--out {out}: {name} was added or edited and would be lost; choose another --out"
            )


def videos_of(samples: Path | None, owner: Path | None) -> list[tuple[Path, str]]:
    """(file, name in samples/) of the videos to show: of --samples the first ones, else the run's newest previews."""
    from data.video import list_videos
    from pipelines.gallery import read_manifest

    if samples is None:
        newest = (
            {re.sub(r"_\d+$", "", p.stem): p for p in sorted((owner / "media").glob("*.mp4"))}
            if owner
            else {}
        )
        return [(path, path.name) for path in newest.values()]
    if not samples.is_dir():
        raise ValueError(f"--samples {samples}: no such folder")
    found = list_videos(samples)[:VIDEOS]
    if not found:
        raise ValueError(f"--samples {samples}: no videos in it")
    classes = read_manifest(samples)[1] if (samples / "manifest.json").is_file() else []
    names = [str(p.relative_to(samples).with_suffix("")) for p in found]
    if classes:  # sample n is of class n modulo their number, and its file is called n
        names = [f"{n}-{classes[int(n) % len(classes)]}" if n.isdecimal() else n for n in names]
    return [(path, re.sub(r"[^\w.-]", "_", n) + ".mp4") for path, n in zip(found, names, strict=True)]


def check_samples(samples: Path | None, kind: str, model: Any) -> None:
    """Refuses videos whose manifest names other weights than those to export."""
    from pipelines.training.open import weights_digest

    manifest = samples / "manifest.json" if samples else None
    if kind != "pipeline" or manifest is None or not manifest.is_file():
        return
    made_by = dict(read_json(manifest, "settings")["settings"]).get("weights_sha256")
    digest = weights_digest(model.transformer)
    if made_by != digest:
        raise ValueError(
            f"--samples {samples}: made with other weights ({str(made_by)[:12]}, exported {digest[:12]}); generate anew"
        )


def write_videos(found: list[tuple[Path, str]], folder: Path) -> None:
    """An mp4 as it is; anything else as H.264."""
    from data.encode import write_mp4
    from data.video import probe, read_frames

    for path, name in found:
        folder.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            shutil.copyfile(path, folder / name)
        else:
            info = probe(path)
            write_mp4(folder / name, read_frames(path, range(info.num_frames)), info.fps or 8)


def write_records(paths: Sequence[Path], folder: Path) -> None:
    """The records, without the folders of this machine."""
    from data.core.files import write_atomic
    from pipelines.model_card import public

    for path in paths:
        text = path.read_text()
        documents = [text] if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
        write_atomic(folder / path.name, "".join(json.dumps(public(json.loads(d))) + "\n" for d in documents))


def forget_origin(folder: Path) -> None:
    """diffusers writes into each config from which folder of this machine it came; that is nobody's business."""
    from data.core.files import write_json

    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        write_json(file, {key: value for key, value in content.items() if key != "_name_or_path"})


def export(args: argparse.Namespace) -> Path:
    """Write the folder, as a whole; returns it."""
    from data.core.files import sha256_of, write_atomic, write_json
    from pipelines.model_card import Card, read_scores, render, training_score
    from pipelines.read_run import read_run
    from pipelines.training.checkpoints import replace_folder
    from pipelines.training.folder import versions
    from pipelines.training.open import weights_digest

    kind, folder, owner = find_model(args.model)
    samples = [args.samples] if args.samples else []
    check_out(args.out, [folder, *samples, *args.records])
    if len({p.name for p in args.records}) < len(args.records):
        raise ValueError(
            "--records: two files of one name; rename one, for they lie side by side in records/"
        )
    model = load(kind, folder)
    check_samples(args.samples, kind, model)
    found = videos_of(args.samples, owner)
    trained = read_run(owner) if owner else None
    vae = model if kind == "vae" else model.vae
    scores = read_scores(args.records, weights_digest(vae)) + training_score(trained)
    name = args.push or args.out.resolve().name
    card = Card(kind, model, name, args.license, args.push, trained, exported_step(folder, trained), scores)
    card.samples = [name for _, name in found]

    def write(target: Path) -> None:
        model.save_pretrained(target)
        forget_origin(target)
        write_videos(found, target / "samples")
        write_records(args.records, target / "records")
        write_atomic(target / "README.md", render(card))
        files = {
            p.relative_to(target).as_posix(): sha256_of(p) for p in sorted(target.rglob("*")) if p.is_file()
        }
        write_json(target / INDEX, {"kind": kind, "versions": versions(), "files": files})

    args.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    replace_folder(args.out, write)
    return args.out


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload to the Hub; returns the address. What goes wrong there is one OSError, and the folder stays."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True, private=not public)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from OmniLatte")
    except (OSError, HTTPError) as error:
        raise OSError(
            f"--push {repo}: {type(error).__name__}: {error} (is the network there, and a token: `hf auth login` or HF_TOKEN?); "
            f"{folder} is complete, the same command tries again"
        ) from error
    return str(address)


def exported_step(folder: Path, trained: Any) -> int | None:
    """The step whose weights the folder holds: of its export.json, else the run's last; None without a run."""
    if trained is None:
        return None
    file = folder / "export.json"
    return int(read_json(file, "step")["step"]) if file.is_file() else trained.step


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.public and not args.push:
        raise ValueError("--public: only with --push REPO")
    from pipelines.training.log import console

    console()
    if args.push:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(args.push)
    print(f"wrote {export(args)}")
    if args.push:
        print(f"pushed to {push(args.out, args.push, args.public)}")
    return 0


if __name__ == "__main__":
    run(main)
