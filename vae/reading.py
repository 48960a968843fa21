"""Reading official weight files: tensors only, nothing in a file is executed, keys and shapes checked strictly."""

import argparse
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from data.core.tensors import differences, some
from data.core.weights import read_weights

logger = logging.getLogger(__name__)
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass
class Release:
    """What was read: tensors by name, the config.json beside them if any, Lightning's training arguments if any."""

    source: str
    state: dict[str, Tensor]
    config: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self.state:
            raise ValueError(
                f"{self.source}: no key {key!r}; it has {len(self.state)} keys, e.g. {some(self.state)}"
            )
        return tuple(self.state[key].shape)

    def count(self, pattern: str) -> int:
        """Count from the keys: 1 + the greatest number that the group of `pattern` takes among them; 0 if none."""
        number = 0
        for match in filter(None, map(re.compile(pattern).match, self.state)):
            number = max(number, 1 + int(match[1]))
        if number > len(self.state):
            raise ValueError(
                f"{self.source}: a key says {number - 1:.4g} where there are {len(self.state)} keys"
            )
        return number

    def widths(self, pattern: str, levels: int) -> list[int]:
        """List the output channels of the tensors `pattern` % level."""
        return [self.shape(pattern % level)[0] for level in range(levels)]

    def keep(self, prefixes: tuple[str, ...], drop: tuple[str, ...]) -> None:
        """Keep keys with one of `prefixes` (all if empty), but none with one of `drop`."""
        for key in list(self.state):
            if key.startswith(drop) or (prefixes and not key.startswith(prefixes)):
                del self.state[key]


def find_file(source: Path) -> Path:
    """Find the weight file: `source` itself, or the only one (safetensors first) in the folder `source`."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(f"{source}: no such file or folder")
    for suffixes in (_SUFFIXES[:1], _SUFFIXES[1:]):
        files = sorted(f for f in source.iterdir() if f.suffix in suffixes and f.is_file())
        if len(files) == 1:
            return files[0]
        if files:
            raise ValueError(
                f"{source}: several weight files ({some(f.name for f in files)}): name the file itself"
            )
    raise ValueError(f"{source}: no weight file ({', '.join(_SUFFIXES)}) in this folder")


def read_checkpoint(file: Path) -> dict:
    """Read what a .safetensors or torch file holds: tensors by name, in a torch file perhaps in dicts of dicts.

    Raises ValueError if the file is damaged, or is not a dict.
    """
    content = read_weights(file, inert=True)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a state dict")
    return content


def read_config(file: Path) -> dict:
    """Read the config.json beside a weight file, {} if there is none. Raises ValueError if it is not a JSON object."""
    path = file.parent / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def read_release(source: str | Path) -> Release:
    """Read the tensors of a .safetensors or torch file (or of a folder with one), its `state_dict` entry if it has one."""
    file = find_file(Path(source))
    content, arguments = read_checkpoint(file), {}
    # Lightning: the weights in `state_dict`, the training's arguments in `hyper_parameters`, alone or as `args`.
    if isinstance(content.get("state_dict"), dict):
        given = content.get("hyper_parameters") or {}
        given = given.get("args", given) if isinstance(given, dict) else given
        given = vars(given) if isinstance(given, argparse.Namespace) else given
        arguments = given if isinstance(given, dict) else {}
        content = content["state_dict"]
    state = {key: v for key, v in content.items() if isinstance(key, str) and isinstance(v, Tensor)}
    return Release(str(file), state, read_config(file), arguments)


def load_strict(build: Callable[[], nn.Module], release: Release, state: dict[str, Tensor]) -> nn.Module:
    """Build on the meta device and take over exactly these tensors, dtype kept; ValueError lists what differs."""
    with torch.device("meta"):
        model = build()
    if wrong := differences(model.state_dict(), state):
        raise ValueError(f"{release.source} does not fit {type(model).__name__}: {wrong}")
    model.load_state_dict(state, assign=True)
    return model.eval()
