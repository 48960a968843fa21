"""Dependencies, with lower bounds only: an environment that already has torch >= 2.6 keeps it.

pip would otherwise take the newest torchvision and, for its sake, another torch. So the installed version is asked for
by number. Everything else is in pyproject.toml; requirements.txt pins a fresh environment.
"""

import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import setup

lines = (Path(__file__).parent / "dependencies.txt").read_text().splitlines()
DEPENDENCIES = [line.partition("  #")[0] for line in lines if line and not line.startswith("#")]


def installed_torch() -> str | None:
    """Version of torch in the environment of this interpreter, without its build tag, even from an isolated build."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = [d.version.partition("+")[0] for d in distributions(name="torch", path=places)]
    return found[0] if found else None


torch = installed_torch()
setup(install_requires=[*DEPENDENCIES, *([f"torch=={torch}"] if torch else [])])
