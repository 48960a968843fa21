"""Small tables, and records as the programs would leave them."""

import json

from pipelines.tables.protocol import wanted
from pipelines.tables.spec import Column, Row, Step, Table


def table_of(steps, rows=("a", "b"), better="up", paper=None, key="psnr", column="PSNR"):
    """A table of one column whose cells are the given steps: {row: [step, ...]}."""
    made = [Row(r, {}, (paper or {}).get(r, {})) for r in rows]
    table = Table("t", "tiny", "trial", "T", "S", "", made, [Column(column, "", key, better)], [], [0], True)
    for row, found in steps.items():
        for step in found:
            table.steps[step.name] = step
        table.cells[row, column] = [s.name for s in found]
    return table


def reconstruction(places, name, frames=25, **changes):
    folder = places.runs / name
    words = ("vae.name=sd2_1", f"out={folder}", f"clip.num_frames={frames}", "source.name=folder")
    return Step(name, folder, folder, "pipelines.reconstruct", words, **changes)


def write_summary(step, psnr, **settings):
    """The record that the step's command would leave, with other settings if asked."""
    tree = {}
    for key, value in (wanted(step) | settings).items():
        *path, last = key.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    step.folder.mkdir(parents=True, exist_ok=True)
    content = {"psnr": psnr, "settings": tree, "versions": {"git": "abc"}}
    (step.folder / "summary.json").write_text(json.dumps(content))


def run_folder(places, name="run", steps=4, asked=4, seed=0, export=True):
    """A run folder of train_vae as it would be after `steps` of `asked` steps, and its step."""
    from pipelines.train_vae import TrainVAEConfig
    from pipelines.training.config import dump, load

    folder = places.runs / name
    words = (f"run_dir={folder}", "steps=" + str(asked), "model.init=random", "clip.num_frames=9")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(load(TrainVAEConfig, None, [*words, f"seed={seed}"])))
    (folder / "env.json").write_text(json.dumps({"versions": {"git": "abc"}}))
    lines = [json.dumps({"step": s, "val/psnr": 20.0 + s + seed}) for s in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    if export:
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text("{}")
    arguments = (*words, f"seed={seed}")
    return Step(name, folder, folder / "vae", "pipelines.train_vae", arguments)


def score(metric, value, **protocol):
    from eval.fvd import parse, protocol_of

    asked = protocol_of(parse(["--real", "r", "--fake", "f"])).as_dict()
    return json.dumps(
        {"metric": metric, "label": "fvd2048_16f", "value": value, "protocol": asked | protocol, "git": "c"}
    )
