"""The README.md of an exported model: what it is, how it was trained, what was measured, how to load it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.read_run import Run, is_number

SCORES = {"vae": ("PSNR", "SSIM", "LPIPS"), "pipeline": ("FVD", "KVD", "IS")}
HIDDEN = ("run_dir", "cache.dir", "source.index_dir")  # settings that tell about a machine, not about a model
_PATH = re.compile(r"(?<![\w.:/])/(?:[^/\s]+/)+")


@dataclass(frozen=True)
class Score:
    """A row of the card's table. record: file name in records/, "" when the number comes from the run's own log."""

    metric: str
    value: str
    protocol: str
    record: str = ""


@dataclass
class Card:
    """All that the card says. kind: "vae" or "pipeline". repo: where it is pushed, "" when it is not."""

    kind: str
    model: Any
    name: str
    licence: str
    repo: str = ""
    run: Run | None = None
    step: int | None = None  # of the run, whose weights these are
    scores: list[Score] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)  # file names in samples/


def public(value: Any) -> Any:
    """The same value with absolute paths reduced to their last name: nobody's folders are published."""
    if isinstance(value, dict):
        return {public(k): public(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(v) for v in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if value.startswith("/") and "\n" not in value else _PATH.sub("", value)


def read_scores(paths: Sequence[Path], digest: str) -> list[Score]:
    """Scores of the judges' JSONL files and of pipelines.reconstruct's summary.json.

    digest: of the exported VAE; a summary of another VAE is refused with a ValueError.
    """
    from eval.report import read_records, row_of

    found = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--records {path}: no such file")
        if path.suffix == ".json":
            found += _summary_scores(path, digest)
            continue
        for record in read_records([path]):
            row = row_of(record)
            made = f"{row['protocol']}, N = {row['N']}, weights {row['weights']}, {row['device']}"
            interval = f" (95 %: {row['95 % interval']})" if row["95 % interval"] else ""
            tag = f"{row['tag']}: " if row["tag"] else ""
            found.append(Score(row["metric"], row["ours"] + interval, public(tag + made), path.name))
    return found


def _summary_scores(path: Path, digest: str) -> list[Score]:
    from pipelines.reconstruct import lpips_of

    try:
        summary = json.loads(path.read_text())
        clip, source = summary["settings"]["clip"], summary["settings"]["source"]["name"]
        values = {m: float(summary[m.lower()]) for m in ("PSNR", "SSIM")}
        name, lpips = lpips_of(summary)
        values |= {} if lpips is None else {name: float(lpips)}
        whole = summary["settings"].get("stream", False) and summary["settings"].get("whole", True)
        videos, made_by = summary["videos"], summary["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--records {path}: no summary of pipelines.reconstruct ({error})") from error
    if made_by != digest:
        raise ValueError(
            f"--records {path}: measured with another VAE (weights {made_by[:12]}, exported {digest[:12]}); measure this one"
        )
    frames = "all" if whole else clip["num_frames"]
    how = f"{source}, {videos} videos, {frames} frames of {clip['size']} pixels, on uint8 in memory"
    return [Score(m, f"{v:.4f}", how, path.name) for m, v in values.items()]


def training_score(run: Run | None) -> list[Score]:
    """The last PSNR of the run's own log."""
    last = run.last("val/psnr") if run else None
    if last is None:
        return []
    how = (
        f"during training, at step {last[0]:,}: {run.settings.get('val_videos')} held-out clips, EMA weights"
    )
    return [Score("PSNR", f"{last[1]:.4f}", how)]


def cell(text: str) -> str:
    """Text that cannot end a table cell or begin a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def render(card: Card) -> str:
    """The whole README.md, with its YAML head."""
    parts = [_head(card), _what(card), _training(card), _numbers(card), _loading(card)]
    if card.samples:
        links = "\n".join(f"- [{name}](samples/{name})" for name in card.samples)
        parts.append(f"## Videos\n\n{links}\n\nH.264, for people to look at; not to be measured.")
    return "\n\n".join([*parts, _limits(card)]) + "\n"


def _head(card: Card) -> str:
    import yaml

    kind = {"vae": "video-vae", "pipeline": "video-generation"}[card.kind]
    names = sorted(
        {s.metric.lower() for s in card.scores if " " not in s.metric}
    )  # random-feature scores are none
    head = {
        "license": card.licence,
        "library_name": "diffusers",
        "tags": ["omnilatte", "video", kind],
        "metrics": names,
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}\n---\n\n# {cell(card.name)}"


def _what(card: Card) -> str:
    if card.kind == "vae":
        vae = card.model
        count = sum(p.numel() for p in vae.parameters())
        s, t = vae.spatial_compression_ratio, vae.temporal_compression_ratio
        return (
            f"A video VAE, `{type(vae).__name__}` with {count:,} parameters: {t}x smaller in time, {s} x {s} in space, "
            f"{vae.config.latent_channels} latent channels."
        )
    latte, vae = card.model.transformer, card.model.vae
    names = list(card.model.config.class_names)
    classes = f"{latte.config.num_classes} classes" if latte.config.num_classes else "no classes"
    listed = (
        f": {', '.join(cell(n) for n in names[:12])}{', ...' if len(names) > 12 else ''}" if names else ""
    )
    count = sum(p.numel() for p in latte.parameters())
    frames = vae.pixel_frames(latte.config.num_frames)
    return (
        f"A video generator: a `Latte` with {count:,} parameters on the latents of a `{type(vae).__name__}` (included). "
        f"It makes {frames} frames; {classes}{listed}."
    )


def _training(card: Card) -> str:
    run = card.run
    if run is None:
        return "## Training\n\nNot known: this folder was exported without its run."
    data = run.checkpoint.get("data", {})
    counts = ", ".join(f"{v:,} {k}" for k, v in data.items() if isinstance(v, int)) or "counts not known"
    cores = sorted({s.get("host_cores") for s in run.starts if s.get("host_cores")})
    memory = run.efficiency.get("tmem", {}).get("device_mib")
    weights = run.starts[-1].get("weights", {}).get("loss") if run.starts else None
    lines = [
        f"- program: `{run.program}`, step {card.step:,} of {run.steps:,}, global batch {run.settings.get('global_batch')}",
        f"- data: `{cell(str(run.settings.get('source.name')))}` ({counts})",
        f"- speed: {_speed(run)}; memory of the GPU: {f'{memory:,.0f} MiB' if is_number(memory) else 'not measured'}",
        f"- machine: {' or '.join(map(str, cores)) or 'unknown number of'} CPU cores; no other hardware is recorded",
        f"- code: {', '.join(f'{k} {v}' for k, v in run.versions.items() if k in ('git', 'python', 'torch', 'diffusers'))}",
    ]
    if weights:
        known = "the published tensors" if weights["known"] else "UNKNOWN tensors"
        lines.append(f"- LPIPS of the loss: `{cell(weights['file'])}`, {known}, sha256 `{weights['sha256']}`")
    kept = {k: v for k, v in run.settings.items() if k not in HIDDEN}
    rows = "\n".join(f"{k}: {json.dumps(public(v), ensure_ascii=False)}" for k, v in kept.items())
    block = (
        f"<details><summary>all settings</summary>\n\n```yaml\n{rows.replace('```', '')}\n```\n\n</details>"
    )
    return "## Training\n\n" + "\n".join(lines) + f"\n\n{block}"


def _speed(run: Run) -> str:
    speed = run.efficiency.get("tspeed")
    return f"{speed:.3f} steps/s, mode {run.efficiency.get('mode')}" if is_number(speed) else "not measured"


def _numbers(card: Card) -> str:
    rows = [
        f"| {cell(s.metric)} | {cell(s.value)} | {cell(s.protocol)} | {f'[{cell(s.record)}](records/{s.record})' if s.record else 'log of the run'} |"
        for s in card.scores
    ]
    measured = {s.metric for s in card.scores}
    rows += [f"| {m} | not measured | | |" for m in SCORES[card.kind] if m not in measured]
    head = "| score | value | protocol | record |\n|---|---|---|---|"
    return "## Numbers\n\n" + "\n".join([head, *rows])


def _loading(card: Card) -> str:
    where = f'snapshot_download("{card.repo}")' if card.repo else '"path/to/this/folder"'
    first = "from huggingface_hub import snapshot_download\n" if card.repo else ""
    if card.kind == "vae":
        name = type(card.model).__name__
        frames = 16 if card.model.frame_rule == "4n" else 17
        code = (
            f"import torch\n{first}from vae import {name}\n\nvae = {name}.from_pretrained({where}).eval()\n"
            f"x = torch.zeros(1, 3, {frames}, 64, 64)  # (B, 3, T, H, W) in [-1, 1]\n"
            "with torch.inference_mode():\n    z = vae.encode(x).latent_dist.mode()\n    video = vae.decode(z).sample\n"
        )
    else:
        label = "labels=[0]" if card.model.transformer.config.num_classes else "num_videos=1"
        code = (
            f"{first}from pipelines.video_pipeline import LatentVideoPipeline\n\n"
            f"pipe = LatentVideoPipeline.from_pretrained({where})\n"
            f"videos = pipe({label}, seeds=[0], num_steps=50).videos  # (1, 3, T, H, W) in [-1, 1]\n"
        )
    return f"## Loading\n\nA diffusers folder with weights in safetensors; the classes are OmniLatte's.\n\n```python\n{code}```"


def _limits(card: Card) -> str:
    lines = [
        "It knows what its training data show, with their biases; other content, sizes and lengths are untested."
    ]
    run, vae = card.run, card.model if card.kind == "vae" else card.model.vae
    if run and "clip.num_frames" in run.settings:
        size = run.settings.get("clip.size")
        lines.append(
            f"Trained on clips of {run.settings['clip.num_frames']} frames of {size} x {size} pixels."
        )
    if not vae.has_scaling_rule:
        lines.append(
            "Its latents have no scaling rule yet: a diffusion model needs `pipelines.cache_latents` first."
        )
    if card.licence == "other":
        lines.append("No licence is stated: it follows from the training data and the initial weights.")
    lines.append("Records and settings are published without the folders of the machine that made them.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)
