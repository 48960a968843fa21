"""Weights of the judging networks: where a file is looked for, what it must be, and which one it was.

Nothing is downloaded and no pickle is run. A number made with random weights carries another metric name.
"""

import hashlib
import logging
import os
import re
import zlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from eval.weight_files import WEIGHT_FILES, WRONG_FILES, WRONG_NAMES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provenance:
    """Which weights made a number. seed: None for a real file.

    known: the digest is the published one, or all tensors are. tensors: what their comparison gave.
    """

    network: str
    file: str
    sha256: str
    known: bool
    seed: int | None = None
    tensors: str = ""

    def metric_name(self, metric: str) -> str:
        """`FVD`, or `random-feature FVD (I3D, seed 0)` so that nobody can mistake it."""
        if self.seed is None:
            return metric
        return f"random-feature {metric} ({self.network}, seed {self.seed})"

    def as_dict(self) -> dict:
        return asdict(self)


@lru_cache(maxsize=16)
def _digests(path: str, size: int, mtime_ns: int) -> tuple[str, str]:
    """(sha256, git blob id) of a file; size and mtime are part of the cache's key."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def identify(path: Path, kind: str) -> Provenance:
    """Digest of a weight file and whether it is the official one.

    Raises ValueError for a file known to be a wrong one. An unknown digest is a warning and is recorded.
    """
    stat = path.stat()
    sha256, blob = _digests(str(path), stat.st_size, stat.st_mtime_ns)
    wrong = WRONG_FILES.get(blob) or next(
        (w for f, w in WRONG_NAMES.items() if path.name.startswith(f)), None
    )
    if wrong:
        official = WEIGHT_FILES[kind]
        raise ValueError(f"{path} is {wrong}; use {official.file} from {official.source}")
    official = WEIGHT_FILES[kind]
    known = blob == official.git_blob or bool(official.sha256 and sha256.startswith(official.sha256))
    if not known:
        reason = (
            "is not the published one"
            if official.sha256 or official.git_blob
            else "cannot be checked (none published)"
        )
        logger.warning("%s: digest %s; sha256 %s goes into the record", path.name, reason, sha256)
    return Provenance(official.network, path.name, sha256, known)


def random_seed(argument: str | None) -> int | None:
    """Seed of `random:SEED`, None for anything else. Raises ValueError for a malformed seed."""
    if argument is None or not str(argument).startswith("random"):
        return None
    match = re.fullmatch(r"random:(\d+)", str(argument))
    if not match:
        raise ValueError(f"--weights {argument}: random weights are written random:SEED, e.g. random:0")
    return int(match.group(1))


def find_weights(kind: str, argument: str | os.PathLike | None = None) -> Path:
    """Path of the file of `kind` ("i3d", "c3d", "c3d_mean", "alexnet").

    argument: a file, a folder that holds the official file, or None for the folder $OMNILATTE_WEIGHTS.
    Raises ValueError with the file's name, source and digest when there is none.
    """
    official = WEIGHT_FILES[kind]
    if argument is None and not os.environ.get("OMNILATTE_WEIGHTS"):
        where = "$OMNILATTE_WEIGHTS is not set"
    else:
        path = Path(argument if argument is not None else os.environ["OMNILATTE_WEIGHTS"]).expanduser()
        if path.is_file():
            return path
        others = [WEIGHT_FILES["i3d_torchscript"].file] if kind == "i3d" else []
        for name in (official.file, Path(official.file).with_suffix(".safetensors"), *others):
            candidate = path / name
            if candidate.is_file():
                return candidate
        where = f"{path} {'has no such file' if path.is_dir() else 'does not exist'}"
    way_out = (
        "--no-lpips (lpips=false, val_lpips=false) leaves LPIPS out"
        if kind == "alexnet"
        else "--weights random:0 is for smoke runs only"
    )
    raise ValueError(
        f"{official.network} weights are missing ({where}): get {official.file} from {official.source} "
        f"({official.digest}) and put it into the folder $OMNILATTE_WEIGHTS or name it; {way_out}"
    )


def require_weights(kind: str, argument: str | None) -> None:
    """Raise the ValueError of `find_weights` now, before a program reads videos or imports torch."""
    if random_seed(argument) is None:
        find_weights(kind, argument)


def read_state(path: Path) -> dict:
    """Tensors of a .pt/.pth (weights only), .safetensors or .npz file. No pickled code is run.

    Raises ValueError when the file is none of these, is damaged, or wants to run code.
    """
    import pickle
    import zipfile

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a plain weight file ({reason})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds {type(state).__name__}, not a dictionary of tensors")
    return state


def load_strict(module, state: dict, source: str) -> None:
    """Load a state dict; missing, extra and misshapen keys are listed, then it stops.

    `num_batches_tracked` may be absent: inference does not use it.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)} != {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or shapes:
        lists = {"missing": missing, "extra": extra, "misshapen": shapes}
        text = "; ".join(f"{len(v)} {k}: {', '.join(v[:4])}" for k, v in lists.items() if v)
        raise ValueError(f"{source}: keys do not fit {type(module).__name__}: {text}")
    module.load_state_dict({**{k: v for k, v in own.items() if k not in state}, **state})


def randomise(module, seed: int) -> None:
    """Fill a network with random weights that keep activations at their scale (He et al., 2015).

    Each tensor is a pure function of (seed, its name). Batch norms stay the identity, biases zero.
    """
    import torch

    last = [name for name, p in module.named_parameters() if p.ndim > 1][-1]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("bn.weight") else 0.0)
                continue
            rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
            values = rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
            gain = 1.0 if name == last else 2.0  # no ReLU after the last layer
            parameter.copy_(torch.from_numpy(values) * (gain / parameter[0].numel()) ** 0.5)


def load_i3d(weights: str | os.PathLike | None = None, eps: float = 1e-5):
    """I3D in eval mode and its provenance; weights: file, folder, None ($OMNILATTE_WEIGHTS) or random:N."""
    from eval.i3d import I3D

    seed = random_seed(weights)
    if seed is not None:
        network = I3D(eps)
        randomise(network, seed)
        return network.eval(), Provenance("I3D", f"random:{seed}", "", False, seed)
    path = find_weights("i3d", weights)
    network = I3D(eps)
    provenance = identify(path, "i3d")
    state = read_i3d(path)
    load_strict(network, state, str(path))
    return network.eval(), provenance if provenance.known else _compare_tensors(provenance, state)


def read_i3d(path: Path) -> dict:
    """The tensors of an I3D file by our names; a dump of the TF-Hub checkpoint is renamed and transposed."""
    import torch

    from eval.checksums import from_tf_names

    arrays = {name: value.numpy() for name, value in read_state(path).items()}
    return {name: torch.from_numpy(np.array(value)) for name, value in from_tf_names(arrays).items()}


def _compare_tensors(provenance: Provenance, state: dict) -> Provenance:
    """Known after all, if every tensor is the TF-Hub checkpoint's."""
    from eval.checksums import differing_tensors, tf_table

    wrong = differing_tensors({name: value.numpy() for name, value in state.items()})
    if not wrong:
        return replace(provenance, known=True, tensors="all equal to TF-Hub deepmind/i3d-kinetics-400/1")
    text = f"{len(wrong)} of {len(tf_table())} differ from TF-Hub deepmind/i3d-kinetics-400/1"
    logger.warning("%s: tensors: %s; its FVD compares with no published one", provenance.file, text)
    return replace(provenance, tensors=text)


def load_c3d(weights: str | os.PathLike | None = None):
    """C3D in eval mode and its provenance; mean2.npz lies beside the weights (.safetensors: inside)."""
    import torch

    from eval.c3d import C3D, crop_mean

    seed = random_seed(weights)
    if seed is not None:
        network = C3D()
        randomise(network, seed)
        network.mean.fill_(128.0)
        with torch.no_grad():
            network.conv1a.weight.mul_(1.0 / 64.0)  # pixels are 0..255: bring them to about [-2, 2]
        return network.eval(), Provenance("C3D", f"random:{seed}", "", False, seed)
    path = find_weights("c3d", weights)
    provenance = identify(path, "c3d")
    state = {k.replace("/W", ".weight").replace("/b", ".bias"): v for k, v in read_state(path).items()}
    if "mean" not in state:
        mean_path = find_weights("c3d_mean", path.parent)
        mean = read_state(mean_path)
        if "mean" not in mean:
            raise ValueError(f"{mean_path}: has {sorted(mean)}, not the array `mean`")
        state["mean"] = crop_mean(mean["mean"])
    network = C3D()
    load_strict(network, state, str(path))
    return network.eval(), provenance
