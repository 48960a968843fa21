"""Write a trained model as a folder to share: weights, model card, records, videos; and upload it."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from data.core.files import read_json, sha256_of, write_atomic, write_json
from data.encode import write_mp4
from data.finding import list_videos
from data.video import probe, read_frames
from pipelines.results.bundle import add_code
from pipelines.results.card import Card, public, read_scores, render, training_score
from pipelines.results.runs import is_run, read_manifest, read_run
from pipelines.training.checkpoints import replace_folder
from pipelines.training.folder import versions
from pipelines.training.open import weights_digest
from pipelines.video_pipeline import LatentVideoPipeline
from vae import load_vae

INDEX = "shared.json"  # names and digests of all files that this program has written
VIDEOS = 8


def find_model(given: Path) -> tuple[str, Path, Path | None]:
    """(kind, folder of the weights, folder of the run or None) of what the user named, else ValueError."""
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


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse a folder with anything in it that this program did not write, and one that holds an input."""
    option, other = f"--out {out}", "choose another --out"
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{option}: {path} lies in it and would be replaced; {other}")
    if out.resolve().is_relative_to(inputs[0].resolve()):
        raise ValueError(f"{option}: inside the model's own folder; {other}")
    if out.is_file():
        raise ValueError(f"{option}: a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    # A folder of this program may be replaced, as long as nobody has changed a file in it.
    try:
        known = dict(json.loads((out / INDEX).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{option}: not empty and not made by this program; {other}") from None
    for name, path in files_of(out).items():
        if name != INDEX and known.get(name) != sha256_of(path):
            raise ValueError(f"{option}: {name} was added or edited and would be lost; {other}")


def files_of(folder: Path) -> dict[str, Path]:
    """All files below a folder: path from there -> path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def videos_of(samples: Path | None, owner: Path | None) -> dict[str, Path]:
    """{name in samples/: file} of the videos to show: of --samples the first ones, else the run's newest previews."""
    if samples is None:
        newest: dict[str, Path] = {}
        for path in sorted((owner / "media").glob("*.mp4")) if owner else ():
            newest[re.sub(r"_\d+$", "", path.stem)] = path
        return {path.name: path for path in newest.values()}
    if not samples.is_dir():
        raise ValueError(f"--samples {samples}: no such folder")
    paths = list_videos(samples)[:VIDEOS]
    if not paths:
        raise ValueError(f"--samples {samples}: no videos in it")
    # Sample n is of class n modulo their number, and its file is called n.
    classes = read_manifest(samples)[1] if (samples / "manifest.json").is_file() else []
    found = {}
    for path in paths:
        name = str(path.relative_to(samples).with_suffix(""))
        if classes and name.isdecimal():
            name += f"-{classes[int(name) % len(classes)]}"
        found[re.sub(r"[^\w.-]", "_", name) + ".mp4"] = path
    return found


def check_samples(samples: Path | None, kind: str, model: Any) -> None:
    """Refuse videos whose manifest names other weights than those to export."""
    manifest = samples / "manifest.json" if samples else None
    if kind != "pipeline" or manifest is None or not manifest.is_file():
        return
    made_by = dict(read_json(manifest, "settings")["settings"]).get("weights_sha256")
    digest = weights_digest(model.transformer)
    if made_by != digest:
        raise ValueError(
            f"--samples {samples}: made with other weights ({str(made_by)[:12]}, exported {digest[:12]}); generate again"
        )


def write_videos(found: dict[str, Path], folder: Path) -> None:
    """An mp4 as it is; anything else as H.264."""
    for name, path in found.items():
        folder.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            shutil.copyfile(path, folder / name)
        else:
            info = probe(path)
            frames = np.asarray(read_frames(path, range(info.num_frames)))
            write_mp4(folder / name, frames, info.fps or 8)


def write_records(paths: Sequence[Path], folder: Path) -> None:
    """The given records, one per line, without the folders of this machine."""
    for path in paths:
        text, kept = path.read_text(), ""
        for line in [text] if path.suffix == ".json" else text.splitlines():
            kept += json.dumps(public(json.loads(line))) + "\n" if line.strip() else ""
        write_atomic(folder / path.name, kept)


def export(
    given: Path, out: Path, samples: Path | None, records: Sequence[Path], licence: str, repo: str
) -> None:
    """Write the folder `out`, as a whole. given: run_dir of a training, or a folder of weights. repo: "" if not pushed."""
    kind, folder, owner = find_model(given)
    check_out(out, [folder, *([samples] if samples else []), *records])
    if len({path.name for path in records}) < len(records):
        raise ValueError("--records: two files of one name; rename one: they lie side by side in records/")
    # The model and what is shown with it
    model = load_vae(folder) if kind == "vae" else LatentVideoPipeline.from_pretrained(folder)
    check_samples(samples, kind, model)
    found = videos_of(samples, owner)

    # The card; its step is that of the folder's export.json, else the run's last.
    trained, step = read_run(owner) if owner else None, None
    if trained:
        file = folder / "export.json"
        step = int(read_json(file, "step")["step"]) if file.is_file() else trained.step
    denoiser = "" if kind == "vae" else weights_digest(model.transformer)
    scores = read_scores(records, weights_digest(model if kind == "vae" else model.vae), denoiser)
    scores += training_score(trained)
    name = repo or out.resolve().name
    card = Card(kind, model, name, licence, repo, trained, step, scores, list(found))

    # The folder, written beside its place and renamed
    def write(target: Path) -> None:
        model.save_pretrained(target)
        # diffusers writes from which folder of this machine each config came.
        for file in target.rglob("*.json"):
            content = json.loads(file.read_text())
            content.pop("_name_or_path", None)
            write_json(file, content)
        add_code(target, model, kind)
        write_videos(found, target / "samples")
        write_records(records, target / "records")
        write_atomic(target / "README.md", render(card))
        files = {name: sha256_of(path) for name, path in files_of(target).items()}
        write_json(target / INDEX, {"kind": kind, "versions": versions(), "files": files})

    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    replace_folder(out, write)


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload to the Hub; returns the address. What goes wrong there is one OSError, and the folder stays."""
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
