"""Weights of the judging networks: where a file is looked for, what it must be, and which one it was.

Nothing is downloaded and no pickle is run. A number made with random weights carries another metric name.
"""

import hashlib
import logging
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.core.environment import weights_folder
from data.core.lazy import lazy
from data.core.tensors import differences
from data.core.weights import read_weights
from eval.weight_files import LPIPS_NAMES, WEIGHT_FILES, WRONG_FILES, WRONG_NAMES

c3d = lazy("eval.c3d")
i3d = lazy("eval.i3d")
torch = lazy("torch")
weight_files = lazy("eval.weight_files")

logger = logging.getLogger(__name__)


def score_name(metric: str, weights: Mapping | None) -> str:
    """Name a score as it may be printed or stored: `LPIPS`, or `random-feature LPIPS (AlexNet, seed 0)`.

    weights: `Provenance.as_dict()` of the network, as records hold it; None when the score needs none. Every
    writer (console, JSON, table, model card, page) names its scores here.
    """
    if not weights or weights.get("seed") is None:
        return metric
    return f"random-feature {metric} ({weights['network']}, seed {weights['seed']})"


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
        """Name a metric of this network, as `score_name`."""
        return score_name(metric, self.as_dict())

    def as_dict(self) -> dict:
        return asdict(self)


@lru_cache(maxsize=16)
def _digests(path: str, size: int, mtime_ns: int) -> tuple[str, str]:
    """Compute (sha256, git blob id) of a file; size and mtime are part of the cache's key."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def _refuse_wrong(path: Path, kind: str) -> tuple[str, str]:
    """Compute (sha256, git blob id) of a file; ValueError for one known to be a wrong one."""
    stat = path.stat()
    sha256, blob = _digests(str(path), stat.st_size, stat.st_mtime_ns)
    wrong = WRONG_FILES.get(blob)
    for prefix, reason in WRONG_NAMES.items():
        if path.name.startswith(prefix):
            wrong = wrong or reason
    if wrong:
        official = WEIGHT_FILES[kind]
        raise ValueError(f"{path} is {wrong}; use {official.file} from {official.source}")
    return sha256, blob


def identify(path: Path, kind: str, state: dict | None = None) -> Provenance:
    """Say which file this is, and whether it or each of its tensors (state, by our names) is the official one.

    Raises ValueError for a file known to be a wrong one. An unknown file is a warning and is recorded.
    """
    # By the digest of the file.
    sha256, blob = _refuse_wrong(path, kind)
    official = WEIGHT_FILES[kind]
    known = blob == official.git_blob or bool(official.sha256 and sha256.startswith(official.sha256))
    # The same tensors in a file of another format have another digest: compare them one by one.
    tensors, wrong = "", False
    if not known and state is not None and (official.tensors or kind == "i3d"):
        tensors, wrong = _compare_tensors(kind, _arrays(state))
        known = not wrong
    # Unknown weights are allowed; the log and the record say so.
    if wrong:
        logger.warning("%s: %s; its scores compare with no published one", path.name, tensors)
    elif not known:
        published = official.sha256 or official.git_blob
        reason = "is not the published one" if published else "cannot be checked (none published)"
        logger.warning("%s: digest %s; sha256 %s goes into the record", path.name, reason, sha256)
    return Provenance(official.network, path.name, sha256, known, tensors=tensors)


def _arrays(state: dict) -> dict[str, np.ndarray]:
    """Convert tensors to numpy arrays; numpy has no bfloat16, so floats become float32."""
    return {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in state.items()}


def _compare_tensors(kind: str, state: dict[str, np.ndarray]) -> tuple[str, bool]:
    """Compare tensors with the official ones: (what was found, whether any differs)."""
    if kind == "i3d":
        official = "TF-Hub deepmind/i3d-kinetics-400/1"
        differing = len(weight_files.differing_tensors(state))
        found = f"{differing} of {len(weight_files.tf_table())} differ from {official}"
    else:
        official = f"the trunk of {WEIGHT_FILES[kind].file}"
        differing = weight_files.tensor_digest(state) != WEIGHT_FILES[kind].tensors
        found = f"tensors differ from {official}"
    return found if differing else f"all equal to {official}", bool(differing)


def random_seed(argument: str | None) -> int | None:
    """Read the seed of `random:SEED`, None for anything else. Raises ValueError for a malformed seed."""
    if argument is None or not str(argument).startswith("random"):
        return None
    match = re.fullmatch(r"random:(\d+)", str(argument))
    if not match:
        raise ValueError(f"--weights {argument}: random weights are written random:SEED, e.g. random:0")
    return int(match.group(1))


def accepted_names(kind: str) -> list[str]:
    """List the file names under which `find_weights` knows a network, the fetched one first."""
    official = WEIGHT_FILES[kind]
    names = [official.fetched] if official.fetched else []
    names += [official.file, Path(official.file).with_suffix(".safetensors").name]
    if kind == "i3d":
        names.append(WEIGHT_FILES["i3d_torchscript"].file)
    return list(dict.fromkeys(names))


def find_weights(kind: str, argument: str | os.PathLike | None = None) -> Path:
    """Find the file of `kind`, a key of WEIGHT_FILES.

    argument: a file, or a folder that holds it; None is `weights_folder()`. A trunk of LPIPS that the folder lacks is
    looked for in torch's hub cache. Raises ValueError with the file's name, source and digest when there is none.
    """
    official = WEIGHT_FILES[kind]
    path = Path(argument).expanduser() if argument is not None else weights_folder()
    if path.is_file():
        return path
    # Under each of its names in the folder, and where torchvision keeps what it downloaded.
    candidates = [path / name for name in accepted_names(kind)]
    if kind in LPIPS_NAMES:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        hub = Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch") / "hub"
        candidates.append(hub / "checkpoints" / official.file)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    # What is missing, where to get it, and how to do without.
    where = f"{path} {'has no such file' if path.is_dir() else 'does not exist'}"
    get = "`bash scripts/fetch_weights.sh` gets them, or " if official.fetched else ""
    way_out = (
        "--no-lpips (lpips=false, val_lpips=false, loss.perceptual_weight=0) leaves LPIPS out"
        if kind in LPIPS_NAMES
        else "--weights random:0 is for smoke runs only"
    )
    raise ValueError(
        f"{official.network} weights are missing ({where}): {get}get {official.file} from {official.source} "
        f"({official.digest}) and put it into the folder $OMNILATTE_WEIGHTS or name it; {way_out}"
    )


def require_weights(kind: str, argument: str | os.PathLike | None) -> None:
    """Raise the ValueError of `find_weights` now, before a program reads videos or imports torch."""
    if random_seed(argument) is None:
        find_weights(kind, argument)


def weights_line(kind: str, argument: str | os.PathLike | None = None) -> str:
    """Say, for --dry-run, where the weights of `kind` are, or what `find_weights` says about missing ones."""
    try:
        return str(argument if random_seed(argument) is not None else find_weights(kind, argument))
    except ValueError as error:
        return f"MISSING: {error}"


def read_state(path: Path) -> dict:
    """Read the tensors of a .pt/.pth (weights only), .safetensors or .npz file. No pickled code is run.

    Raises ValueError when the file is none of these, is damaged, or wants to run code.
    """
    state = read_weights(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise ValueError(f"{path}: holds {type(state).__name__}, not a dictionary of tensors")
    return state


def load_strict(module, state: dict, source: str) -> None:
    """Load a state dict; ValueError lists missing and extra keys and wrong shapes.

    `num_batches_tracked` may be absent: inference does not use it.
    """
    own = module.state_dict()
    if wrong := differences(own, state, [k for k in own if k.endswith("num_batches_tracked")]):
        raise ValueError(f"{source}: keys do not fit {type(module).__name__}: {wrong}")
    module.load_state_dict({**{k: v for k, v in own.items() if k not in state}, **state})


def randomise(module, seed: int) -> None:
    """Fill a network with random weights that keep activations at their scale (He et al., 2015).

    Each tensor is a pure function of (seed, its name). Batch norms stay the identity, biases zero.
    """
    last = [name for name, p in module.named_parameters() if p.ndim > 1][-1]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # Scales and biases.
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("bn.weight") else 0.0)
                continue
            # Weights: variance 2 / fan-in before a ReLU, 1 / fan-in in the last layer, which has none.
            rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
            values = rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
            gain = 1.0 if name == last else 2.0
            parameter.copy_(torch.from_numpy(values) * (gain / parameter[0].numel()) ** 0.5)


def open_weights(kind: str, path: Path) -> tuple[dict, Provenance]:
    """Read the tensors of a weight file by our names, and say what it is. The one reader for all networks.

    A trunk comes without its classifier, `features.INDEX.weight`; a dump of the TF-Hub checkpoint is renamed.
    Raises ValueError for a file known to be a wrong one, or that is not a plain weight file.
    """
    _refuse_wrong(path, kind)
    state = read_state(path)
    if kind == "i3d":
        arrays = weight_files.from_tf_names(_arrays(state))
        state = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    elif kind in LPIPS_NAMES:
        state = {name: value for name, value in state.items() if name.startswith("features.")}
    elif kind == "c3d":
        state = {k.replace("/W", ".weight").replace("/b", ".bias"): v for k, v in state.items()}
    return state, identify(path, kind, state)


def load_i3d(weights: str | os.PathLike | None = None, eps: float = 1e-5):
    """Load I3D in eval mode, with its provenance; weights: as `find_weights`, or random:SEED."""
    seed, network = random_seed(weights), i3d.I3D(eps)
    if seed is not None:
        randomise(network, seed)
        return network.eval(), Provenance("I3D", f"random:{seed}", "", False, seed)
    path = find_weights("i3d", weights)
    state, provenance = open_weights("i3d", path)
    load_strict(network, state, str(path))
    return network.eval(), provenance


def load_c3d(weights: str | os.PathLike | None = None):
    """Load C3D in eval mode, with its provenance; mean2.npz lies beside the weights (.safetensors: inside)."""
    seed, network = random_seed(weights), c3d.C3D()
    if seed is not None:
        randomise(network, seed)
        network.mean.fill_(128.0)
        with torch.no_grad():
            network.conv1a.weight.mul_(1.0 / 64.0)  # pixels are 0..255: bring them to about [-2, 2]
        return network.eval(), Provenance("C3D", f"random:{seed}", "", False, seed)
    path = find_weights("c3d", weights)
    state, provenance = open_weights("c3d", path)
    if "mean" not in state:
        state["mean"] = load_c3d_mean(find_weights("c3d_mean", path.parent))[0]
    load_strict(network, state, str(path))
    return network.eval(), provenance


def load_c3d_mean(path: Path):
    """Load the mean clip of C3D's training, as the network sees it, with its provenance."""
    state, provenance = open_weights("c3d_mean", path)
    if "mean" not in state:
        raise ValueError(f"{path}: has {sorted(state)}, not the array `mean`")
    return c3d.crop_mean(state["mean"]), provenance
