"""CRC32C (Castagnoli) in numpy, and the check of I3D weights against the TF-Hub checkpoint, tensor by tensor.

i3d_tf_crc32c.json holds, for each of our tensors, the name, shape and checksum that the index file of
deepmind/i3d-kinetics-400/1 lists. All 230 equal: the weights are the original ones, whatever file they came in.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

TABLE_FILE = Path(__file__).with_name("i3d_tf_crc32c.json")
POLYNOMIAL = 0x82F63B78  # reflected
MASK_DELTA = 0xA282EAD8  # TensorFlow stores checksums of checksummed data rotated and shifted by this


@lru_cache(maxsize=1)
def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


def _after_zeros(states: np.ndarray, operator: np.ndarray) -> np.ndarray:
    """A linear operator on 32-bit states, given by its images of the 32 unit vectors, applied to many states."""
    out = np.zeros_like(states)
    for bit in range(32):
        out ^= np.where((states >> np.uint32(bit)) & 1, operator[bit], np.uint32(0))
    return out


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC32C of bytes. Many equal pieces are run side by side and joined pairwise: 50 MB take about a second."""
    raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    table, length = _byte_table(), 256
    lanes = 1 << max(0, (len(raw) // length).bit_length() - 1) if len(raw) >= length else 0
    state = np.uint32(0xFFFFFFFF)
    start = 0
    while lanes:
        block = raw[start : start + lanes * length].reshape(lanes, length)
        states = np.zeros(lanes, np.uint32)
        states[0] = state
        for column in np.ascontiguousarray(block.T):
            states = table[(states ^ column) & 0xFF] ^ (states >> np.uint32(8))
        operator = np.uint32(1) << np.arange(32, dtype=np.uint32)
        for _ in range(length):
            operator = table[operator & 0xFF] ^ (operator >> np.uint32(8))
        while len(states) > 1:
            states = _after_zeros(states[0::2], operator) ^ states[1::2]
            operator = _after_zeros(operator, operator)  # twice as many zeros
        state, start = states[0], start + lanes * length
        lanes = (
            1 << max(0, ((len(raw) - start) // length).bit_length() - 1) if len(raw) - start >= length else 0
        )
    value = int(state)
    for byte in raw[start:].tolist():
        value = int(table[(value ^ byte) & 0xFF]) ^ (value >> 8)
    return value ^ 0xFFFFFFFF


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


def differing_tensors(state: dict[str, np.ndarray]) -> list[str]:
    """Keys of I3D whose bytes are not those of the TF-Hub checkpoint; batch-norm scales must be ones."""
    wrong = []
    for key, entry in tf_table().items():
        raw = to_tf_layout(state[key])
        if raw.nbytes != entry["nbytes"] or masked(crc32c(raw)) != entry["crc32c_masked"]:
            wrong.append(key)
    return wrong + [key for key in state if key.endswith("bn.weight") and not np.all(state[key] == 1)]
