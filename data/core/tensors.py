"""Weights of other files and other models: read as tensors only, and compared strictly before they are taken."""

from collections.abc import Iterable, Mapping
from typing import Any


def some(names: Iterable[str], most: int = 20) -> str:
    """The first of the names, sorted, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differences(wanted: Mapping[str, Any], given: Mapping[str, Any], optional: Iterable[str] = ()) -> str:
    """What keeps a state dict from being loaded: "" or counts and names of missing tensors, extra ones, and wrong shapes.

    optional: keys of `wanted` that may be missing.
    """
    shapes = (
        f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted.keys() & given.keys()
        if given[key].shape != wanted[key].shape
    )
    kinds = {
        "missing": wanted.keys() - given.keys() - set(optional),
        "extra": given.keys() - wanted.keys(),
        "wrong shapes": list(shapes),
    }
    return "; ".join(f"{len(names)} {kind}: {some(names)}" for kind, names in kinds.items() if names)
