"""Dependencies, with lower bounds only: an environment that already has torch >= 2.6 keeps it.

pip would otherwise take the newest torchvision and, for its sake, another torch. So the installed version is asked for
by number. Everything else is in pyproject.toml; requirements.txt pins a fresh environment.
"""

import sysconfig
from importlib.metadata import distributions

from setuptools import setup

DEPENDENCIES = [
    "torch>=2.6",
    "torchvision",  # lpips and timm import it
    "timm>=1.0",  # ModelEmaV3: plain EMA, as the paper's
    "diffusers>=0.36",  # ModelMixin/ConfigMixin, schedulers, AutoencoderKL
    "accelerate>=1.6",
    "deepspeed>=0.16",
    "transformers>=4.46",  # accelerate's DeepSpeed plugin asks for its version
    "av>=14.1",  # the reader, the scanner and the writer of video; VideoFrame.rotation is from 14.1 on
    # the other reader (source.reader=decord); no wheel elsewhere, and the project runs without it
    "decord>=0.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "numpy>=1.26",
    "scipy>=1.12",
    "tensorboard>=2.16",
    "safetensors>=0.5",
    "filelock>=3.12",  # one training a run folder
    "omegaconf>=2.3",  # YAML + key=value merged strictly into dataclasses
    "pyyaml>=6",  # plain reading of tables and run settings; omegaconf brings it
    "lpips>=0.1.4",
    "google-crc32c>=1.5",  # checksums of the TF-Hub checkpoint: I3D's 50 MB in milliseconds
    "pillow>=10",
    "tqdm>=4.66",
    "matplotlib>=3.8",  # curves of the report
    "jinja2>=3.1",  # the report's page
    "huggingface_hub>=0.30",  # export --push; diffusers brings it
]


def installed_torch() -> str | None:
    """Version of torch in the environment of this interpreter, without its build tag, even from an isolated build."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = [d.version.partition("+")[0] for d in distributions(name="torch", path=places)]
    return found[0] if found else None


torch = installed_torch()
setup(install_requires=[*DEPENDENCIES, *([f"torch=={torch}"] if torch else [])])
