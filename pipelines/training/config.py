"""Typed configuration: a dataclass holds the defaults, a short YAML the differences, `key=value` overrides both.

Importing this module, parsing and `--help` never import torch.
"""

import argparse
import copy
import dataclasses
import difflib
import enum
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data.core.lazy import lazy

errors = lazy("omegaconf.errors")
omegaconf = lazy("omegaconf")
yaml = lazy("yaml")

T = TypeVar("T")
USUAL_NAMES = {  # other projects' names -> ours, the first that a program has
    "lr": "learning_rate",
    "wd": "weight_decay",
    "epochs": "steps num_steps",
    "num_epochs": "steps",
    "max_steps": "steps",
    "max_train_steps": "steps",
    "num_steps": "steps",
    "num_inference_steps": "num_steps",
    "iters": "steps",
    "iterations": "steps",
    "bs": "global_batch batch",
    "batch": "global_batch",
    "batch_size": "global_batch batch",
    "train_batch_size": "global_batch",
    "gradient_accumulation_steps": "micro_batch",
    "grad_accum": "micro_batch",
    "ema": "ema_decay",
    "betas": "adam_betas",
    "num_workers": "workers",
    "output_dir": "run_dir out",
    "out_dir": "run_dir out",
    "output": "run_dir out",
    "out": "run_dir",
    "data": "source.root",
    "data_dir": "source.root",
    "data_path": "source.root",
    "root": "source.root",
    "dataset": "source.name",
    "csv": "source.list_file",
    "frames": "clip.num_frames",
    "num_frames": "clip.num_frames",
    "resolution": "clip.size",
    "image_size": "clip.size",
    "size": "clip.size",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "dtype": "precision",
    "mixed_precision": "precision",
    "grad_checkpointing": "gradient_checkpointing",
    "max_grad_norm": "grad_clip",
    "clip_grad": "grad_clip",
    "cfg": "guidance_scale samples.guidance_scale",
    "cfg_scale": "guidance_scale samples.guidance_scale",
    "classes": "labels",
    "checkpoint": "model.init_from denoiser.init_from pipeline",
    "ckpt": "model.init_from denoiser.init_from pipeline",
    "pretrained": "model.init_from denoiser.init_from",
    "resume_from_checkpoint": "run_dir",
    "wandb": "log_with",
    "report_to": "log_with",
}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A (nested) dataclass instance as {"a.b": value}; enums become their values."""
    # A field is a value, or it holds dataclasses that are flattened in turn.
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = _inner(value, prefix + field.name)
        for name, part in inner.items():
            flat.update(flatten(part, name + "."))
        if not inner:
            flat[prefix + field.name] = value.value if isinstance(value, enum.Enum) else value
    return flat


def _inner(value: Any, name: str) -> dict[str, Any]:
    """{dotted name: dataclass} of a setting that holds one dataclass or a mapping of them; else {}."""
    if dataclasses.is_dataclass(value):
        return {name: value}
    if isinstance(value, dict):
        return {f"{name}.{key}": part for key, part in value.items() if dataclasses.is_dataclass(part)}
    return {}


def free_keys(config: Any, prefix: str = "") -> set[str]:
    """Keys that may differ when a run is resumed."""
    keys: set[str] = set()
    for field in dataclasses.fields(config):
        name, free = prefix + field.name, field.metadata.get("free")
        inner = _inner(getattr(config, field.name), name)
        for key, part in inner.items():
            keys |= set(flatten(part, key + ".")) if free else free_keys(part, key + ".")
        if free and not inner:
            keys.add(name)
    return keys


def load(cls: type[T], path: str | Path | None = None, overrides: list[str] = ()) -> T:
    """Merge defaults, the YAML file and `key=value` overrides into `cls`; unknown keys and wrong types are errors."""
    for item in overrides:
        if "=" not in item:
            raise ValueError(f"argument {item!r}: settings are written key=value, e.g. steps=100")
    base = omegaconf.OmegaConf.structured(cls)
    try:
        # Defaults first, then the file, then the command line: the later one counts.
        layers = [base]
        if path:
            layers.append(omegaconf.OmegaConf.create(_hide(read_yaml(path))))
        texts, typed = [], []
        for item in overrides:
            if _is_text(cls, item):
                texts.append(item)
            else:
                typed.append(item.replace("${", _DOLLAR))
        # Numbers, lists and choices are read as YAML.
        layers.append(omegaconf.OmegaConf.from_dotlist(typed))
        # Text as it stands: a folder called 001 or 1e3 is not a number. A leading ~ is the home folder.
        for item in texts:
            key, _, text = item.partition("=")
            omegaconf.OmegaConf.update(layers[-1], key, _hide(text), force_add=True)
        return _show(omegaconf.OmegaConf.to_object(omegaconf.OmegaConf.merge(*layers)))
    except errors.OmegaConfBaseException as error:
        raise ValueError(_explain(error, flatten(cls()))) from error


_DOLLAR = "\ue000{"  # stands for "${", which omegaconf would fill in, from the environment too: here text stays text


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every text in it changed; dataclasses in place."""
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        return change(value)
    if isinstance(value, dict):
        return {_texts(key, change): _texts(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_texts(part, change) for part in value]
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            setattr(value, field.name, _texts(getattr(value, field.name), change))
    return value


def _hide(value: Any) -> Any:
    return _texts(value, lambda text: os.path.expanduser(text).replace("${", _DOLLAR))


def _show(value: Any) -> Any:
    return _texts(value, lambda text: text.replace(_DOLLAR, "${"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file, as plain dicts, lists, numbers and texts. Raises ValueError if it holds no settings."""
    if not Path(path).is_file():
        raise ValueError(f"config {path}: no such file; the shipped ones are under configs/")
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from error


def parse_yaml(text: str) -> dict[str, Any]:
    """`read_yaml` of a text."""
    broken = yaml.YAMLError, errors.OmegaConfBaseException, ValueError, RecursionError, AssertionError
    try:
        read = omegaconf.OmegaConf.create(text.replace("${", _DOLLAR))
        plain = omegaconf.OmegaConf.to_container(read, resolve=False)
    except broken as error:
        raise ValueError(f"not valid YAML settings: {str(error) or 'no key: value in it'}") from error
    if not isinstance(plain, dict):
        raise ValueError("must be settings (key: value), not a list")
    return _show(plain)


def _is_text(cls: type, item: str) -> bool:
    """Whether `key=value` sets a field of type str."""
    # Down the dotted name, through dataclasses and mappings of them, to the type of its last part.
    *names, last = item.partition("=")[0].split(".")
    while names:
        name = names.pop(0)
        field = _fields(cls).get(name)
        if field is not None and field.metadata.get("of") and names:
            names.pop(0)  # the key in a mapping
            cls = field.metadata["of"]
        else:
            cls = type(getattr(cls(), name, None))
        if not dataclasses.is_dataclass(cls):
            return False
    return last in _fields(cls) and _fields(cls)[last].type is str


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls)}


def at_least(config: Any, least: float, *names: str) -> None:
    """ValueError for the first of the named settings (dotted) that is below `least`."""
    for name in names:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if not value >= least:
            raise ValueError(f"{name}={value}: must be at least {least:g}")


def _explain(error: Exception, known: dict[str, Any]) -> str:
    key = getattr(error, "full_key", None) or str(getattr(error, "key", None) or "settings")
    first = str(error).splitlines()[0]
    if isinstance(error, errors.ConfigKeyError) or "not in" in first:
        # What other projects call it, else the name that looks most like it
        theirs = USUAL_NAMES.get(key.rpartition(".")[2].lower(), "").split()
        usual = [name for name in theirs if name in known]
        close = usual or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"config: unknown key {key!r}{hint} (--help lists all keys)"
    if choice := re.fullmatch(r"Invalid value '(.*)', expected one of \[(.*)\]", first):
        return f"{key}={choice[1]!r}: choose one of {choice[2]}"
    return f"config: {key}: {first}"


def dump(config: Any) -> str:
    """The resolved configuration as YAML text."""
    return omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.structured(_hide(copy.deepcopy(config)))).replace(
        _DOLLAR, "${"
    )


def _help_lines(cls: type, prefix: str = "") -> list[str]:
    lines = []
    defaults = cls()
    for field in dataclasses.fields(cls):
        # A group of settings, a mapping of groups, or one setting on a line.
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            lines += _help_lines(type(value), f"{prefix}{field.name}.")
            continue
        if field.metadata.get("of"):
            lines.append(f"  {prefix}{field.name}  {field.metadata['help']}")
            lines += _help_lines(field.metadata["of"], f"{prefix}{field.name}.NAME.")
            continue
        shown = value.value if isinstance(value, enum.Enum) else value
        choices = f" [{'|'.join(e.value for e in type(value))}]" if isinstance(value, enum.Enum) else ""
        lines.append(f"  {prefix + field.name}={shown!r}{choices}  {field.metadata.get('help', '')}".rstrip())
    return lines


def parse(
    cls: type[T],
    argv: list[str] | None,
    program: str,
    about: str,
    flags: dict[str, str] | None = None,
    switches: dict[str, str] | None = None,
    planned: bool = False,
) -> tuple[T, argparse.Namespace]:
    """Read a program's command line: `--config FILE`, `--dry-run`, the named flags, and `key=value` for the rest.

    planned: the program has `--plan`, and with it `card=NAME`, which is args.card afterwards.

    flags: {"--vae": "vae.name"}: a flag is another spelling of one key. switches: {"--verify": help}, true when given.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{program}",
        description=about,
        epilog="settings (key=default):\n" + "\n".join(_help_lines(cls)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # What every program has
    add, dry = parser.add_argument, "print the resolved settings and the plan, then stop"
    add("--config", metavar="FILE", help="YAML with the settings that differ from the defaults")
    add("--dry-run", action="store_true", help=dry)
    # What only some programs have
    if planned:
        plan = "print memory, time and what fits on a card, from a simulation, then stop; "
        plan += "card=h100|h200|a100|a100-40|l40s|rtx4090|rtx3090, default the one here"
        add("--plan", action="store_true", help=plan)
    for switch, text in (switches or {}).items():
        parser.add_argument(switch, action="store_true", help=text)
    for flag, key in (flags or {}).items():
        word, text = key.rpartition(".")[2].upper(), f"same as {key}=..."
        as_setting = functools.partial("{}={}".format, key)
        parser.add_argument(flag, dest="flags", action="append", type=as_setting, metavar=word, help=text)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides, e.g. steps=100")
    # card=NAME is a word of --plan, no setting.
    args = parser.parse_intermixed_args(argv)
    args.card = ""
    if planned and args.plan:
        for word in [word for word in args.settings if word.startswith("card=")]:
            args.card = word.removeprefix("card=")
            args.settings.remove(word)
    return load(cls, args.config, [*args.settings, *(vars(args).get("flags") or [])]), args
