"""The README.md of an exported model: what it is, how it was trained, what was measured, how to load it (card.md.j2)."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data.core.files import read_json
from eval.fidelity import METRICS
from pipelines.results.bundle import needs_code
from pipelines.results.markdown import markdown_table, plain
from pipelines.results.page import is_number
from pipelines.results.runs import Run
from pipelines.scores import read_records, row_of

SCORES = {"vae": tuple(metric.name for metric in METRICS), "pipeline": ("FVD", "KVD", "IS")}
TASKS = {"vae": "video-vae", "pipeline": "video-generation"}
HIDDEN = ("run_dir", "cache.dir", "source.index_dir")  # settings that tell about a machine, not about a model
_PATH = re.compile(r"(?<![\w.:/])/(?:[^/\s]+/)+")


@dataclass(frozen=True)
class Score:
    """A row of the card's table. record: file name in records/, "" when the number comes from the run's own log."""

    metric: str
    value: float
    text: str
    protocol: str
    dataset: str = "unknown"
    record: str = ""

    def cells(self) -> list[str]:
        record = f"[{plain(self.record)}](records/{self.record})" if self.record else "log of the run"
        return [plain(self.metric), plain(self.text), plain(self.protocol), record]


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
        return list(map(public, value))
    if not isinstance(value, str):
        return value
    return Path(value).name if value.startswith("/") and "\n" not in value else _PATH.sub("", value)


def read_scores(paths: Sequence[Path], digest: str, denoiser: str = "") -> list[Score]:
    """Scores of the judges' JSONL files and of pipelines.reconstruct's summary.json.

    digest, denoiser: of the exported VAE and denoiser; what names another one is refused with a ValueError.
    """
    found = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--records {path}: no such file")
        records = read_records([path])
        # Of a summary: that it is of this VAE, and how it was made
        made = ""
        if path.suffix == ".json":
            summary = read_json(path)
            made_by, settings = summary["weights_sha256"], summary["settings"]
            if made_by != digest:
                raise ValueError(
                    f"--records {path}: measured with another VAE (weights {made_by[:12]}, exported {digest[:12]}); measure this one"
                )
            whole = settings.get("stream", False) and settings.get("whole", True)
            frames = "all" if whole else settings["clip"]["num_frames"]
            made = f"{settings['source']['name']}, {summary['videos']} videos, {frames} frames of "
            made += f"{settings['clip']['size']} pixels, on uint8 in memory"
        for record in records:
            # Generated videos, whose manifest tells the denoiser
            settings = ((record.get("fake") or {}).get("manifest") or {}).get("settings") or {}
            made_by = settings.get("weights_sha256", denoiser)
            if denoiser and made_by != denoiser:
                raise ValueError(
                    f"--records {path}: its {record['metric']} is of videos of another denoiser (weights "
                    f"{str(made_by)[:12]}, exported {denoiser[:12]}); give the records of this one in a file of their own"
                )
            row = row_of(record)
            interval = f" (95 %: {row['95 % interval']})" if row["95 % interval"] else ""
            how = f"{row['protocol']}, N = {row['N']}, weights {row['weights']}, {row['device']}"
            how = made or public(f"{row['tag']}: {how}" if row["tag"] else how)
            dataset = row["tag"].partition("/")[0] or "unknown"
            found.append(
                Score(row["metric"], record["value"], row["ours"] + interval, how, dataset, path.name)
            )
    return found


def training_score(run: Run | None) -> list[Score]:
    """The last PSNR of the run's own log."""
    last = run.last("val/psnr") if run else None
    if last is None:
        return []
    clips = f"{run.settings.get('val_videos')} held-out clips, EMA weights"
    how = f"during training, at step {last[0]:,}: {clips}"
    return [Score("PSNR", last[1], f"{last[1]:.4f}", how, str(run.settings.get("source.name")))]


def card_data(card: Card) -> ModelCardData:
    """The card's YAML head, with the Hub's model-index; scores of random weights are not in it."""
    task, results = TASKS[card.kind], []
    for score in card.scores:
        if " " not in score.metric and is_number(score.value):
            where = {"task_type": task, "dataset_type": score.dataset, "dataset_name": score.dataset}
            what = {"metric_type": score.metric.lower(), "metric_value": score.value}
            results.append(EvalResult(**where, **what, metric_name=f"{score.metric} ({score.protocol})"))
    return ModelCardData(
        license=card.licence,
        library_name="diffusers",
        tags=["omnilatte", "video", task],
        metrics=sorted({result.metric_type for result in results}),
        model_name=card.name if results else None,
        eval_results=results or None,
    )


def render(card: Card) -> str:
    """The whole README.md, with its YAML head."""
    vae = card.model if card.kind == "vae" else card.model.vae
    latte = None if card.kind == "vae" else card.model.transformer
    # The table of scores: what was measured, and what one would expect and was not
    rows, missing = [], list(SCORES[card.kind])
    for score in card.scores:
        rows.append(score.cells())
        if score.metric in missing:
            missing.remove(score.metric)
    rows += [[metric, "not measured", "", ""] for metric in missing]
    # The words that card.md.j2 fills in
    words = {
        "plain": plain,
        "vae": vae,
        "vae_class": type(vae).__name__,
        "latte": latte,
        "params": (latte or vae).num_parameters(),
        "numbers": markdown_table(["score", "value", "protocol", "record"], rows).rstrip(),
        "where": card.repo or "path/to/this/folder",
        "code": latte is not None or needs_code(vae),
        "frames": sum(vae.clip_lengths) if vae.clip_lengths != (1, 0) else 9,
        "side": vae.kernel[1]
        if hasattr(vae, "kernel")
        else 8 * vae.spatial_compression_ratio,  # Allegro's tile
    }
    if latte:
        words["frames"] = vae.pixel_frames(latte.config.num_frames)
        words["class_names"] = list(map(plain, card.model.config.class_names))
    words |= vars(card) | (_training(card.run) if card.run else {})
    template = Path(__file__).parent / "card.md.j2"
    return ModelCard.from_template(card_data(card), str(template), **words).content.rstrip() + "\n"


def _training(run: Run) -> dict[str, Any]:
    """How a model was trained, in words of the template."""
    # What it saw, on which machine, with which code
    data = [f"{v:,} {k}" for k, v in run.checkpoint.get("data", {}).items() if isinstance(v, int)]
    cores = set(filter(None, (start.get("host_cores") for start in run.starts)))
    speed = run.speed_text("steps/s")
    code = []
    for name in ("python", "git", "torch", "diffusers"):
        if name in run.versions:
            code.append(f"{name} {run.versions[name]}")
    # All settings but those that tell about a machine
    settings = []
    for key, value in run.settings.items():
        if key not in HIDDEN:
            settings.append(f"{key}: {json.dumps(public(value), ensure_ascii=False)}")
    return {
        "data_counts": ", ".join(data) or "counts not known",
        "speed": f"{speed}, mode {run.efficiency.get('mode')}" if speed else "not measured",
        "memory": run.memory_text(),
        "cores": " or ".join(map(str, sorted(cores))),
        "code": ", ".join(code),
        "teacher": run.starts[-1].get("weights", {}).get("loss") if run.starts else None,
        "settings": "\n".join(settings).replace("```", ""),
    }
