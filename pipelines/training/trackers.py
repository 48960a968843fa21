"""W&B and the other experiment trackers that accelerate knows, by the setting log_with. TensorBoard is written without it."""

import hashlib
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from data.core.files import read_json
from pipelines.training.config import flatten

PROJECT = "omnilatte"


def tracker_names(log_with: str) -> list[str]:
    """The trackers of a setting, e.g. "tensorboard,wandb", without tensorboard. Raises ValueError for one that is not installed."""
    names = [name for name in map(str.strip, log_with.split(",")) if name not in ("", "none", "tensorboard")]
    # Known to accelerate, and installed.
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    there = list(map(str, get_available_trackers()))
    for name in names:
        if name not in known:
            raise ValueError(f"log_with={log_with}: {name!r} is none of none, {', '.join(known)}")
        # what a caller registered with accelerate has no package to look for
        if name not in there and LOGGER_TYPE_TO_CLASS[name].__module__ == "accelerate.tracking":
            raise ValueError(
                f"log_with={log_with}: {name} is not installed here; pip install it, or choose of {', '.join(there)}"
            )
    return list(dict.fromkeys(names))


def start_trackers(accelerator: Any, config: Any, folder: Path) -> list[Any]:
    """Begin, or continue, this run in the trackers that the accelerator was made with; [] when there are none.

    Its settings go along. A run of W&B has the name of the folder, and an id of the folder's own, so that a resumed run is the same one.
    """
    if not accelerator.log_with:
        return []
    # W&B finds the run again by the folder and its first start.
    env = folder / "env.json"
    began = read_json(env)["starts"][0].get("time", "") if env.is_file() else ""
    own = hashlib.sha256(f"{folder.resolve()} {began}".encode()).hexdigest()[:16]
    wandb = {"name": folder.name, "id": own, "resume": "allow", "dir": str(folder)}
    try:
        accelerator.init_trackers(PROJECT, plain_settings(config), {"wandb": wandb})
    except Exception as error:  # each tracker has its own kinds, e.g. wandb's UsageError without a login
        raise ValueError(
            f"log_with={','.join(map(str, accelerator.log_with))}: cannot begin ({error}); log in, or log_with=none"
        ) from error
    return list(accelerator.trackers)


def plain_settings(config: Any) -> dict[str, Any]:
    """The settings flat, as numbers, booleans and texts, which is what a table of hyperparameters takes."""
    plain = flatten(config)
    for key, value in plain.items():
        if not isinstance(value, bool | int | float | str):
            plain[key] = str(value)
    return plain
