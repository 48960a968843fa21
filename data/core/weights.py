"""The one reader of weight files: tensors, numbers and containers; nothing that a file holds is ever run."""

import argparse
import errno
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from data.core.lazy import lazy
from data.core.tensors import some

logger = logging.getLogger(__name__)
pickle = lazy("pickle")
safetensors = lazy("safetensors.torch")
torch = lazy("torch")


def read_weights(path: str | Path, inert: bool = False) -> Any:
    """Read what a .safetensors, .npz or torch file holds, on the CPU. No pickled code is run.

    inert: argparse.Namespace is read too, and objects of other classes become empty ones, named in the log: Lightning
    stores callbacks (taming) and the training's arguments (TATS) beside the weights. Raises ValueError when the file is
    none of these, is damaged, or holds other objects; OSError and MemoryError of the machine stay what they are.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with warnings.catch_warnings(), torch.serialization.safe_globals(_allowed(path) if inert else []):
            warnings.simplefilter("ignore")  # torch's, on the pickle protocol of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the readers raise many kinds on what is no weight file
        # The disk's own errors stay what they are; EINVAL is torch, which seeks beyond the end of a cut file.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path}: damaged, or not a plain weight file ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Say why a file was not read, in a few words; torch's own would advise to run what is in it."""
    if isinstance(error, (pickle.UnpicklingError, KeyError)):
        return "it is damaged, or holds Python objects beside tensors, and those are never run"
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"damaged safetensors file: {text}" if type(error).__name__ == "SafetensorError" else text


class _Inert:
    """Stands for any Python object in a checkpoint that is not a tensor: takes any arguments, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _allowed(path: Path) -> list[Any]:
    """Make classes for torch's reader: argparse.Namespace, and an inert one for each other that the file names."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # a file in the format before torch 1.6 cannot be listed beforehand
        unknown = []
    unknown = [name for name in unknown if name != "argparse.Namespace"]
    if unknown:
        logger.warning("%s: ignoring stored objects that are not tensors: %s", path, some(unknown))
    return [argparse.Namespace, *((type("Inert", (_Inert,), {}), name) for name in unknown)]
