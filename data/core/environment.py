"""Whether the installed packages are new enough: the bounds of dependencies.txt, checked before a program starts."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

_FILE = Path(__file__).parents[2] / "dependencies.txt"


def requirements() -> list[Requirement]:
    """Read what this project declares: of the checkout, or of the installed package where there is no checkout."""
    if _FILE.is_file():
        lines = [line.partition("#")[0].strip() for line in _FILE.read_text().splitlines()]
        return list(map(Requirement, filter(None, lines)))
    try:
        return list(map(Requirement, metadata.requires("omnilatte") or []))
    except metadata.PackageNotFoundError:
        return []


def _too_old() -> Iterator[str]:
    for needed in requirements():
        # Not those of other systems or of extras.
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            continue  # a missing package is named by its own import, where it is needed
        if not needed.specifier.contains(Version(version).base_version):
            yield f"{needed.name} is {version}, this project needs {needed.specifier}"


def check_packages() -> None:
    """Raise ValueError that names every installed package older than the project can use."""
    if old := list(_too_old()):
        raise ValueError(
            f"{'; '.join(old)}. Update them, or make the pinned environment: bash scripts/setup.sh"
        )
