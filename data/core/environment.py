"""What surrounds a program: the repository, the folder of weights, and packages that are new enough (dependencies.txt)."""

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from data.core.lazy import lazy

packaging = lazy("packaging.requirements")
versions = lazy("packaging.version")

ROOT = Path(__file__).resolve().parents[2]
_FILE = ROOT / "dependencies.txt"


def weights_folder() -> Path:
    """Return where VAEs and judges are looked for: $OMNILATTE_WEIGHTS, else weights/ of this repository."""
    return Path(os.environ.get("OMNILATTE_WEIGHTS") or ROOT / "weights").expanduser()


def requirements() -> list:
    """Read what this project declares: of the checkout, or of the installed package where there is no checkout."""
    if _FILE.is_file():
        lines = [line.partition("#")[0].strip() for line in _FILE.read_text().splitlines()]
        return list(map(packaging.Requirement, filter(None, lines)))
    try:
        return list(map(packaging.Requirement, metadata.requires("omnilatte") or []))
    except metadata.PackageNotFoundError:
        return []


def _too_old() -> Iterator[str]:
    """Say of each installed package that is too old which version it has and which is needed."""
    for needed in requirements():
        # Not those of other systems or of extras.
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            continue  # a missing package is named by its own import, where it is needed
        if not needed.specifier.contains(versions.Version(version).base_version):
            yield f"{needed.name} is {version}, this project needs {needed.specifier}"


def check_packages() -> None:
    """Raise ValueError that names every installed package older than the project can use."""
    if old := list(_too_old()):
        raise ValueError(
            f"{'; '.join(old)}. Update them, or make the pinned environment: bash scripts/setup.sh"
        )
