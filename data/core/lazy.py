"""Imports that wait until they are needed: reading a command line takes no torch, and `--help` answers at once."""

from importlib import import_module
from typing import Any


class lazy:
    """A stand-in for a module, which is imported when the first of its names is used: `torch = lazy("torch")`."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)
