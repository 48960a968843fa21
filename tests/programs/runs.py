"""Run folders written by hand, for programs that only read them."""

import json

import numpy as np

from data.encode import write_ffv1, write_mp4


def write_run(folder, steps=100, metrics=(), speed=(), settings=None, videos=()):
    """A run of train_vae: its files, with the given records and names of previews."""
    folder.mkdir(parents=True)
    values = {
        "run_dir": str(folder),
        "steps": steps,
        "global_batch": 4,
        "clip": {"num_frames": 9, "size": 16},
    }
    (folder / "config.yaml").write_text(json.dumps(values | (settings or {})))  # JSON is YAML
    start = {"time": "2026-01-01T00:00:00+0000", "command": ["x"], "host_cores": 2}
    env = {"program": "train_vae", "versions": {"torch": "2.6", "git": "abc"}, "starts": [start]}
    (folder / "env.json").write_text(json.dumps(env))
    for name, records in (("metrics.jsonl", metrics), ("speed.jsonl", speed)):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    for name in videos:
        write_mp4(folder / "media" / name, noise(5, 16, 48), 8)
    return folder


def noise(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def write_samples(folder, count=8, classes=("cat", "dog"), size=16, frames=5):
    """A folder as pipelines.sample makes it."""
    names = [f"{i:06d}.mkv" for i in range(count)]
    for i, name in enumerate(names):
        write_ffv1(folder / name, noise(frames, size, size, i), 8)
    settings = {"labels": [], "class_names": list(classes), "fps": 8.0, "sampler": "ddim", "num_steps": 50}
    (folder / "manifest.json").write_text(json.dumps({"settings": settings, "files": names}))
    return folder
