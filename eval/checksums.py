"""Checksums of weights: I3D against the TF-Hub checkpoint, tensor by tensor, and one digest for the tensors of others.

i3d_tf_crc32c.json holds, for each of our tensors, the name, shape and checksum that the index file of
deepmind/i3d-kinetics-400/1 lists. All 230 equal: the weights are the original ones, whatever file they came in.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import google_crc32c
import numpy as np

TABLE_FILE = Path(__file__).with_name("i3d_tf_crc32c.json")
MASK_DELTA = 0xA282EAD8  # TensorFlow stores checksums of checksummed data rotated and shifted by this


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC32C (Castagnoli) of bytes, or of an array's bytes."""
    return google_crc32c.value(data if isinstance(data, bytes) else data.tobytes())


def masked(crc: int) -> int:
    """A checksum as TensorFlow and LevelDB store it."""
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


@lru_cache(maxsize=1)
def tf_table() -> dict[str, dict]:
    """{our key: {"tf_name", "tf_shape", "nbytes", "crc32c_masked"}} of the 230 tensors."""
    return json.loads(TABLE_FILE.read_text())


def to_tf_layout(value: np.ndarray) -> np.ndarray:
    """(out, in, t, h, w) -> (t, h, w, in, out); vectors as they are. Float32, contiguous."""
    value = value.transpose(2, 3, 4, 1, 0) if value.ndim == 5 else value
    return np.ascontiguousarray(value, dtype=np.float32)


def from_tf_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A dump of the TF-Hub checkpoint (names .../conv_3d/w, [t, h, w, in, out]) with our keys and layout.

    Arrays under other names are returned as they are. Batch norms have no scale there: ones are put in.
    """
    ours = {entry["tf_name"]: key for key, entry in tf_table().items()}
    if not any(name.split(":")[0] in ours for name in arrays):
        return arrays
    state = {}
    for name, value in arrays.items():
        key = ours.get(name.split(":")[0], name)
        if key.endswith("conv3d.weight") and value.ndim == 5:
            state[key] = np.ascontiguousarray(value.transpose(4, 3, 0, 1, 2))
        else:
            state[key] = value.reshape(-1) if key in tf_table() else value
        if key.endswith("bn.bias"):
            state[key.removesuffix("bias") + "weight"] = np.ones(state[key].shape, np.float32)
    return state


def tensor_digest(state: dict[str, np.ndarray]) -> str:
    """sha256 over names, shapes and float32 values: the same in whatever file and order the tensors come."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value, np.float32))
    return digest.hexdigest()


def differing_tensors(state: dict[str, np.ndarray]) -> list[str]:
    """Keys of I3D that are missing or not the TF-Hub checkpoint's bit for bit; batch-norm scales must be ones."""
    wrong = []
    for key, entry in tf_table().items():
        raw = to_tf_layout(state[key]) if key in state else np.empty(0)
        if raw.nbytes != entry["nbytes"] or masked(crc32c(raw)) != entry["crc32c_masked"]:
            wrong.append(key)
    return wrong + [key for key in state if key.endswith("bn.weight") and not np.all(state[key] == 1)]
