"""Write a trained model as a folder to share: weights, model card, records, videos; and upload it."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass
class Request:
    """What the user asks for. model: run_dir of a training, or a folder of weights."""

    model: Path
    out: Path
    samples: Path | None = None
    records: list[Path] = field(default_factory=list)
    licence: str = "other"
    push: str = ""


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


def load(kind: str, folder: Path) -> Any:
    """The pipeline or the VAE. Raises ValueError when it is neither."""
    if kind == "vae":
        return load_vae(folder)
    return LatentVideoPipeline.from_pretrained(folder)


def check_out(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse a folder with anything in it that this program did not write, and one that holds an input."""
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
    if samples is None:
        previews = sorted((owner / "media").glob("*.mp4")) if owner else []
        newest = {re.sub(r"_\d+$", "", path.stem): path for path in previews}
        return [(path, path.name) for path in newest.values()]
    if not samples.is_dir():
        raise ValueError(f"--samples {samples}: no such folder")
    found = list_videos(samples)[:VIDEOS]
    if not found:
        raise ValueError(f"--samples {samples}: no videos in it")
    classes = read_manifest(samples)[1] if (samples / "manifest.json").is_file() else []
    names = [str(path.relative_to(samples).with_suffix("")) for path in found]
    if classes:  # sample n is of class n modulo their number, and its file is called n
        names = [f"{n}-{classes[int(n) % len(classes)]}" if n.isdecimal() else n for n in names]
    return [(path, re.sub(r"[^\w.-]", "_", n) + ".mp4") for path, n in zip(found, names, strict=True)]


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


def write_videos(found: list[tuple[Path, str]], folder: Path) -> None:
    """An mp4 as it is; anything else as H.264."""
    for path, name in found:
        folder.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            shutil.copyfile(path, folder / name)
        else:
            info = probe(path)
            write_mp4(folder / name, read_frames(path, range(info.num_frames)), info.fps or 8)


def export(request: Request) -> Path:
    """Write the folder, as a whole; returns it."""
    kind, folder, owner = find_model(request.model)
    check_out(request.out, [folder, *([request.samples] if request.samples else []), *request.records])
    if len({path.name for path in request.records}) < len(request.records):
        raise ValueError("--records: two files of one name; rename one: they lie side by side in records/")
    # The model and what is shown with it
    model = load(kind, folder)
    check_samples(request.samples, kind, model)
    found = videos_of(request.samples, owner)

    # The card
    trained, step = read_run(owner) if owner else None, None
    if trained:  # the step whose weights the folder holds: of its export.json, else the run's last
        file = folder / "export.json"
        step = int(read_json(file, "step")["step"]) if file.is_file() else trained.step
    digest = weights_digest(model if kind == "vae" else model.vae)
    card = Card(
        kind,
        model,
        name=request.push or request.out.resolve().name,
        licence=request.licence,
        repo=request.push,
        run=trained,
        step=step,
        scores=read_scores(request.records, digest) + training_score(trained),
        samples=[name for _, name in found],
    )

    # The folder, written beside its place and renamed
    def write(target: Path) -> None:
        model.save_pretrained(target)
        for file in target.rglob(
            "*.json"
        ):  # diffusers writes from which folder of this machine each config came
            content = {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"}
            write_json(file, content)
        add_code(target, model, kind)
        write_videos(found, target / "samples")
        for path in request.records:  # without the folders of this machine
            text = path.read_text()
            lines = [text] if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
            kept = "".join(json.dumps(public(json.loads(line))) + "\n" for line in lines)
            write_atomic(target / "records" / path.name, kept)
        write_atomic(target / "README.md", render(card))
        paths = sorted(path for path in target.rglob("*") if path.is_file())
        files = {path.relative_to(target).as_posix(): sha256_of(path) for path in paths}
        write_json(target / INDEX, {"kind": kind, "versions": versions(), "files": files})

    request.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    replace_folder(request.out, write)
    return request.out


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
