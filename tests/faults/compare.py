"""What a kill interrupted, and what of two finished folders must be equal to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def place_of_death(folder: Path) -> str:
    """Which guarded action the kill interrupted, read off what it left behind."""
    run = folder / "run"
    if any(run.glob("checkpoints/.step_*")) or len(list(run.glob("checkpoints/step_*"))) > 2:
        return "save"
    if any(run.glob(".*.old")) or any(p.is_dir() for p in run.glob(".*.tmp")):
        return "export"
    return "file" if any(p.is_file() for p in folder.rglob(".*.tmp-*")) else ""


def different_files(one: Path, two: Path, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Files below that are not equal to the bit, and hidden leftovers."""

    def content(root: Path) -> dict[str, bytes]:
        files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
        return {name: p.read_bytes() for name, p in files.items() if p.name not in leave_out}

    a, b = content(one), content(two)
    wrong = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return wrong + [str(p) for p in two.rglob(".*") if p.name != ".lock"]


def training_differences(export: str) -> Callable[[Path, Path], list[str]]:
    """Checkpoints (weights, EMA, optimizers, counters), metrics and export; the manifest names another run_dir.

    A run that was asked to stop has saved at another step: the newest checkpoint must be the same one, and all that both have.
    """

    def compare(one: Path, two: Path) -> list[str]:
        steps = [sorted(p.name for p in (folder / "run/checkpoints").iterdir()) for folder in (one, two)]
        wrong = (
            []
            if steps[0][-1:] == steps[1][-1:] and len(steps[1]) == len(steps[0])
            else [f"checkpoints {steps}"]
        )
        for step in sorted({*steps[0]} & {*steps[1]}):
            a, b = (folder / "run/checkpoints" / step for folder in (one, two))
            wrong += different_files(a, b, ("manifest.json", "COMPLETE", "trainer.pt"))
            if not same(torch_load(a / "trainer.pt"), torch_load(b / "trainer.pt")):
                wrong.append(f"{step}/trainer.pt")
        wrong += different_files(one / "run" / export, two / "run" / export)
        if (one / "run/metrics.jsonl").read_bytes() != (two / "run/metrics.jsonl").read_bytes():
            wrong.append("metrics.jsonl")
        return wrong + [p.name for p in (two / "run").glob(".*") if p.name != ".lock"]

    return compare


def torch_load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit; tensors at any depth of dicts and lists (the bytes of a .pt file are not unique)."""
    import torch

    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def cache_differences(one: Path, two: Path) -> list[str]:
    """Every file of the cache, and the statistics stored with the VAE."""
    return different_files(one / "cache", two / "cache") + different_files(one / "vae", two / "vae")


def sample_differences(one: Path, two: Path) -> list[str]:
    """Every frame (the container holds a random number), and a manifest that says complete."""
    from data.video import read_frames

    names = sorted(p.name for p in (one / "out").glob("*.mkv"))
    wrong = [] if names == sorted(p.name for p in (two / "out").rglob("*.mkv")) else ["other files"]
    for name in names:
        a, b = (read_frames(folder / "out" / name, range(9)) for folder in (one, two))
        wrong += [] if (a == b).all() else [name]
    complete = json.loads((two / "out" / "manifest.json").read_text())["complete"]
    return wrong if complete else [*wrong, "manifest.json: not complete"]


def score_differences(one: Path, two: Path) -> list[str]:
    """The last record of each metric, the files judged, and the features kept; a record is a line of its own."""

    def scores(folder: Path) -> dict[str, tuple]:
        records = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        return {
            r["metric"]: (r["value"], r["real"]["files_sha256"], r["fake"]["files_sha256"]) for r in records
        }

    wrong = [] if scores(one) == scores(two) else [f"scores: {scores(one)} and {scores(two)}"]
    return wrong + different_files(one / "judge/features", two / "judge/features")
