"""SIGKILL training, caching and sampling at random moments, start them again until they finish, compare bit for bit.

    python tests/faults/kills.py --kills 50 --out kills.json

Each start is a process of its own, forked from a parent that has imported everything and run no tensor operation, so
a start costs no import. Four kinds of kill: "moment" after a random time; "group" one of SIGINT, SIGTERM, SIGHUP and
SIGUSR1 then to all processes of a training with two readers, which must end with 128 + the signal's number; "save" a few milliseconds after a hidden
checkpoint folder has appeared; "operation" before a random file operation (an audit hook kills its own process), which
reaches the places between two renames that no clock hits. Programs under `accelerate launch` with two processes have
others: "process" SIGKILL of one of the two, "all" of both and the launcher, "group" a signal to all of them, at random
moments from the run's opening on; "save" is of all.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.demo import DemoVideos  # noqa: E402
from data.encode import write_ffv1  # noqa: E402
from tests.faults.compare import (  # noqa: E402
    cache_differences,
    place_of_death,
    sample_differences,
    score_differences,
    training_differences,
)
from tests.faults.processes import in_child, start, wait  # noqa: E402
from tests.programs.conftest import LATTE, VAE  # noqa: E402

KINDS = dict.fromkeys(("train_vae", "train_latte"), ("save", "operation", "moment", "group"))
LAUNCHED = ("process", "save", "all", "group")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class Stage:
    """A program with its settings for a folder, and what of two finished folders must be equal."""

    program: str
    settings: Callable[[Path], list[str]]
    differences: Callable[[Path, Path], list[str]]
    prepare: Callable[[Path], None] = lambda folder: None
    readers: tuple[str, ...] = ("workers=2",)  # settings of a start that gets a signal
    launch: str = ""


def stages(work: Path, steps: int) -> dict[str, Stage]:
    """The programs; `work` holds what they start from, see prepare(). steps: of a training run."""
    often = [f"steps={steps}", "save_every=2", "log_every=3"]

    def vae(folder: Path) -> list[str]:
        return [*VAE, f"run_dir={folder}/run", "loss.gan_start=4", "val_every=8", *often]

    def cache(folder: Path) -> list[str]:
        return [*LATTE, f"vae.path={folder}/vae", f"cache.dir={folder}/cache", "cache.shard_size=2"]

    def latte(folder: Path) -> list[str]:
        more = ["samples.every=12", "samples.steps=2", "samples.num_videos=2", *often]
        return [*LATTE, f"vae.path={work}/vae", f"cache.dir={work}/cache", f"run_dir={folder}/run", *more]

    def sample(folder: Path) -> list[str]:
        return [
            f"pipeline={work}/run/pipeline",
            f"out={folder}/out",
            "num_videos=8",
            "num_steps=4",
            "batch=1",
        ]

    def judge(folder: Path) -> list[str]:
        sets = [
            f"--real={work}/real",
            f"--fake={work}/fake",
            "--num-videos=4",
            "--num-frames=9",
            "--workers=1",
        ]
        return [
            *sets,
            "--weights=random:0",
            "--batch-size=1",
            f"--cache-dir={folder}/judge",
            f"--out={folder}/scores.jsonl",
        ]

    def copy_vae(folder: Path) -> None:
        shutil.copytree(work / "fresh-vae", folder / "vae")

    return {
        "train_vae": Stage("train_vae", vae, training_differences("vae")),
        "train_latte": Stage("train_latte", latte, training_differences("pipeline")),
        "ddp_vae": Stage("train_vae", vae, training_differences("vae"), launch="ddp8"),
        "ddp_latte": Stage("train_latte", latte, training_differences("pipeline"), launch="ddp8"),
        "zero2_latte": Stage("train_latte", latte, training_differences("pipeline"), launch="zero2_8"),
        "cache_latents": Stage("cache_latents", cache, cache_differences, copy_vae),
        "sample": Stage("sample", sample, sample_differences, readers=()),
        "judge": Stage("eval.fvd", judge, score_differences, readers=()),
    }


def prepare(work: Path) -> None:
    """A VAE without statistics (fresh-vae), one with them, its cache, and a pipeline."""
    work.mkdir(parents=True)
    wait(*start("train_vae", [*VAE, f"run_dir={work}/first", "steps=2"], work))
    shutil.copytree(work / "first/vae", work / "fresh-vae")
    shutil.copytree(work / "first/vae", work / "vae")
    common = [*LATTE, f"vae.path={work}/vae", f"cache.dir={work}/cache", f"run_dir={work}/run", "steps=2"]
    for program in ("cache_latents", "train_latte"):
        wait(*start(program, common, work))
    for seed, name in enumerate(("real", "fake")):
        scenes = DemoVideos(4, num_frames=9, size=32, seed=seed)
        for n in range(4):
            write_ffv1(work / name / f"{n}.mkv", scenes.frames(n, range(9)), 8)


def finish(stage: Stage, folder: Path) -> tuple[float, int]:
    """Run to the end without a kill: (seconds, of a launch from the run's opening on; file operations)."""
    before, began = opened(folder), time.monotonic()

    def look() -> bool:
        nonlocal before, began
        if stage.launch and opened(folder) != before:
            before, began = opened(folder), time.monotonic()
        return False

    started = start(stage.program, stage.settings(folder), folder, launch=stage.launch)
    _, operations = wait(*started, look)
    return time.monotonic() - began, len(operations)


def opened(folder: Path) -> int:
    """Changes when a training opens its run."""
    file = folder / "run/env.json"
    return file.stat().st_mtime_ns if file.exists() else 0


def one_kill(stage: Stage, folder: Path, kind: str, draw: random.Random, seconds: float, operations: int):
    """Start and kill; None if the program finished first, else a record of the kill."""
    before = draw.randint(1, operations) if kind == "operation" else 0
    began, due = time.monotonic(), draw.uniform(0, seconds)
    left, later, seen, before_it = draw.randint(1, 4), draw.uniform(0, 0.05), set(), opened(folder)

    def kill() -> bool:
        nonlocal due, began, before_it
        now = time.monotonic() - began
        if stage.launch and before_it is not None:
            if opened(folder) != before_it:
                began, before_it = time.monotonic(), None
            return False
        if kind == "save" and not left <= len(seen):
            seen.update(p.name for p in folder.glob("run/checkpoints/.step_*.tmp"))
            due = now + later if left <= len(seen) else now + seconds
        return kind != "operation" and now >= due

    settings, number = stage.settings(folder), signal.SIGKILL
    if kind == "group":
        settings, number = [*settings, *stage.readers], draw.choice(SIGNALS)
    started = start(stage.program, settings, folder, before, stage.launch)

    def aim(processes: list[int]) -> list[int]:
        return [draw.choice(processes[1:] or processes)] if kind == "process" else processes

    killed, said = wait(*started, kill, number, aim if stage.launch else None)
    if not killed:
        return None
    last = said[-1] if kind == "operation" else ""
    named = {"signal": signal.Signals(number).name} if kind == "group" else {}
    return {"kind": kind, **named, "inside": place_of_death(folder), "before": last}


def survive(name: str, stage: Stage, kills: int, saves: int, seed: int, work: Path) -> dict:
    """Kill `kills` times, and on until `saves` of them were inside a save, in as many runs as that takes.

    Every run is brought to its end and compared.
    """
    draw, records, wrong, runs, missed = random.Random(f"{name} {seed}"), [], [], 0, 0
    kinds = LAUNCHED if stage.launch else KINDS.get(name, ("moment", "operation", "group"))
    reference = new_folder(stage, work / f"{name}-whole")
    seconds, operations = finish(stage, reference)

    def wanting() -> bool:
        return len(records) < kills or sum(r["inside"] == "save" for r in records) < saves

    while wanting():
        folder = new_folder(stage, work / f"{name}-{runs}")
        while wanting():
            record = one_kill(stage, folder, kinds[len(records) % len(kinds)], draw, seconds, operations)
            if record is None:
                missed += 1
                break
            records.append(record)
            missed = 0
        finish(stage, folder)
        found = in_child(lambda folder=folder: stage.differences(reference, folder))
        wrong += [f"{folder.name}: {difference}" for difference in found]
        runs += 1
        shutil.rmtree(folder)
        if missed >= 20:
            raise RuntimeError(
                f"{name}: 20 runs in a row ended before a kill of kind {kinds[len(records) % len(kinds)]}"
            )
    inside = Counter(r["inside"] or "elsewhere" for r in records)
    return {"kills": len(records), "runs": runs, "inside": inside, "differences": wrong, "records": records}


def new_folder(stage: Stage, folder: Path) -> Path:
    folder.mkdir(parents=True)
    stage.prepare(folder)
    return folder


def preload() -> None:
    """Import what the programs will import, so that children have it."""
    import torch.utils.tensorboard  # noqa: F401
    from tensorboard.compat.proto import summary_pb2  # noqa: F401

    import pipelines.cache_latents
    import pipelines.sample
    import pipelines.train_latte
    import pipelines.train_vae  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=6, help="of each program (default 6)")
    parser.add_argument("--saves", type=int, default=20, help="at least so many inside a save of a training")
    parser.add_argument("--steps", type=int, default=24, help="of a training run (default 24)")
    parser.add_argument("--programs", default=",".join(stages(Path(), 0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    preload()
    results, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch) / "start")
        for name in args.programs.split(","):
            then = time.monotonic()
            stage = stages(Path(scratch) / "start", args.steps)[name]
            saves = args.saves if name in KINDS or stage.launch else 0
            results[name] = survive(name, stage, args.kills, saves, args.seed, Path(scratch))
            results[name]["seconds"] = round(time.monotonic() - then, 1)
            shown = {k: v for k, v in results[name].items() if k != "records"}
            print(f"{name}: {json.dumps(shown)}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_result(args.out, results, round(time.monotonic() - began), args)
    return 1 if any(r["differences"] for r in results.values()) else 0


def write_result(file: Path, results: dict, seconds: int, args: argparse.Namespace) -> None:
    """The kills as JSON, and a page beside it."""
    from pipelines.training.folder import versions

    names = ("git", "python", "torch", "accelerate", "diffusers")
    known = {k: v for k, v in versions().items() if k in names}
    command = f"bash scripts/kill_test.sh --kills {args.kills} --saves {args.saves} --steps {args.steps} --seed {args.seed}"
    command += f" --programs {args.programs}"
    hardware = f"{os.cpu_count()} {platform.machine()} CPU cores, no GPU"
    head = {"command": command, "date": time.strftime("%Y-%m-%d"), "hardware": hardware, "versions": known}
    file.write_text(json.dumps({**head, "seconds": seconds, "programs": results}, indent=1) + "\n")
    software = ", ".join(f"{k} {v}" for k, v in known.items() if k != "git")
    table = [
        "| program | kills | inside a save or an export | while a file was written | runs brought to their end | not equal |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        inside = Counter(r["inside"])
        saves = inside["save"] + inside["export"]
        row = [name, r["kills"], saves, inside["file"], r["runs"], len(r["differences"])]
        table.append("| " + " | ".join(map(str, row)) + " |")
    page = f"""# Kills and signals at random moments

`{command}`, {seconds} s on {hardware}, {head["date"]}, {software}, commit {known["git"]}.

Each program was killed, started again with the same command until it ended, and its end compared bit for bit with that of
a program which was never killed: weights, EMA, both optimizers, counters, metrics.jsonl and the exported folder; the
files of the cache; every frame of the samples; every score, and the features kept. A kill is SIGKILL, or a signal that asks to
stop, sent to all processes of a start, launchers and readers too. How the kills are drawn is in tests/faults/kills.py, each of them in
{file.name}.

"""
    file.with_suffix(".md").write_text(page + "\n".join(table) + "\n")


if __name__ == "__main__":
    sys.exit(main())
