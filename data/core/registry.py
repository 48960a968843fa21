"""VAEs, losses, samplers and data sets of one's own, each added by one decorator (docs/extending.md has a template).

    @vaes.add("mine")          a class as those of vae/baselines, which stage one does not train; --vae mine
    @losses.add("mine")        (x, xhat), clips (B, 3, T, H, W) in [-1, 1] -> a scalar; loss.extra.mine.weight=0.1
    @samplers.add("mine")      number of steps -> a scheduler with timesteps and step; sampler=mine
    @sources.add("mine")       (root, split) -> data.layouts.Found; source.name=mine

Who looks for a name that this project does not have imports first what $OMNILATTE_PLUGINS names (modules, with commas
between) and the entry points of the group `omnilatte` of installed packages: importing them is what adds their names.
"""

import functools
import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any


class Registry(dict[str, Any]):
    """Names -> what was added under them. `find` imports the plugins when it does not know a name yet."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def add(self, name: str) -> Callable[[Any], Any]:
        """Register what is decorated under a name. Raises ValueError for a name that something else has already."""

        def register(thing: Any) -> Any:
            # a module that is imported again brings the same thing as another object
            if name in self and self[name].__qualname__ != thing.__qualname__:
                raise ValueError(f"{self.kind} {name!r}: added twice, as {self[name]} and {thing}")
            self[name] = thing
            return thing

        return register

    def find(self, name: str) -> Any | None:
        """Find what has this name, None if nothing has it."""
        if name not in self:
            load_plugins(os.environ.get("OMNILATTE_PLUGINS", ""))
        return self.get(name)


vaes, losses, samplers, sources = map(Registry, ("VAE", "loss", "sampler", "source"))


@functools.cache
def load_plugins(modules: str) -> None:
    """Import the modules, with commas between, and the entry points of the group `omnilatte`; once each."""
    for name in filter(None, map(str.strip, modules.split(","))):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
            raise ValueError(
                f"OMNILATTE_PLUGINS={modules}: no module {name!r}; is it on PYTHONPATH?"
            ) from error
    for entry in entry_points(group="omnilatte"):
        entry.load()
