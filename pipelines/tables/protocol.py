"""The settings that a step's command asks for, and how a record's settings differ from them."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.tables.spec import Step

# Where things lie; no result depends on that.
_PLACES = {
    "root",
    "init_from",
    "path",
    "out",
    "pipeline",
    "transformer",
    "dir",
    "run_dir",
    "index_dir",
    "lpips_weights",
}
# What records say that were made before these settings came.
_BEFORE = {"vae.tiling_frames": 0, "tiling_frames": 0, "held_out": False}
_SHOWN = 3  # differences named in one message
_CONFIGS = {
    "pipelines.train_vae": "TrainVAEConfig",
    "pipelines.train_latte": "TrainLatteConfig",
    "pipelines.cache_latents": "TrainLatteConfig",
    "pipelines.sample": "SampleConfig",
    "pipelines.reconstruct": "ReconstructConfig",
    "pipelines.benchmark": "BenchmarkConfig",
}


def wanted(step: Step) -> dict[str, Any]:
    """All settings of a command that decide its result, flat; paths and speed settings left out."""
    from pipelines.training.config import flatten, free_keys

    config = config_of(step)
    free = free_keys(config)
    return comparable({k: v for k, v in flatten(config).items() if k not in free})


def comparable(flat: dict[str, Any]) -> dict[str, Any]:
    """Flat settings without those that only say where things lie; of a list file its name counts."""
    kept = {k: v for k, v in flat.items() if k.rsplit(".", 1)[-1] not in _PLACES}
    return {k: Path(v).name if k.endswith("list_file") and v else v for k, v in kept.items()}


def differences(asked: dict[str, Any], recorded: dict[str, Any]) -> str:
    """ "" or the settings of both that differ. A setting that one does not know had its default there."""
    recorded = _BEFORE | comparable(recorded)
    both = [k for k in asked if k in recorded and not _equal(asked[k], recorded[k])]
    text = ", ".join(f"{k} is {recorded[k]!r}, asked {asked[k]!r}" for k in both[:_SHOWN])
    return text + (f" and {len(both) - _SHOWN} more" if len(both) > _SHOWN else "")


def _equal(a: Any, b: Any) -> bool:
    return json.loads(json.dumps(a, default=str)) == json.loads(json.dumps(b, default=str))


def config_of(step: Step) -> Any:
    """The settings object that the command line makes."""
    from pipelines.training.config import load

    words = list(step.arguments)
    if words[:1] == ["vae"]:  # benchmark's subject
        words = words[1:]
    file = None
    if "--config" in words:
        place = words.index("--config")
        file = words[place + 1]
        del words[place : place + 2]
    module = import_module(step.program)  # cache_latents reads the settings of train_latte
    return load(getattr(module, _CONFIGS[step.program]), file, words)
