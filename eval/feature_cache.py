"""Features on the disk, keyed by everything that made them, so that a run resumes and a set is judged once.

A key is a digest of the content of the files, the frames taken, the network, its weights and settings. A batch is
one file, written whole or not at all; a second program with the same key writes the same bytes.
"""

import hashlib
import io
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np

from data.core.files import remove_leftovers, write_atomic

logger = logging.getLogger(__name__)


def cache_folder(argument: str | None, *roots: str | Path) -> Path:
    """Return the folder of caches: the argument, $OMNILATTE_CACHE, or ~/.cache/omnilatte.

    ValueError if inside a data folder.
    """
    folder = Path(argument or os.environ.get("OMNILATTE_CACHE") or Path.home() / ".cache" / "omnilatte")
    for root in roots:
        if Path(root).is_dir() and folder.resolve().is_relative_to(Path(root).resolve()):
            raise ValueError(f"--cache-dir {folder} lies inside the videos {root}; choose a folder outside")
    # Found out now, not after the first batch.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cache {folder}: cannot be written ({error.strerror}); give another with --cache-dir, or --no-cache"
        ) from error
    return folder


def scan_file(folder: Path, root: str | Path) -> Path:
    """Name the file that keeps the scan of one folder of videos."""
    name = hashlib.sha256(str(Path(root).resolve()).encode()).hexdigest()[:16]
    return folder / "scans" / f"{name}.sqlite"


class FeatureCache:
    """The features of one list of clips. content: anything JSON; equal content is the same features."""

    def __init__(self, folder: Path, content: dict):
        self.key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / "features"
        self.whole = self.folder / f"{self.key[:32]}.npy"
        remove_leftovers(self.folder)

    @staticmethod
    def _read(path: Path) -> np.ndarray | None:
        """Read a cached array; None if it is not there or not as it was written, which costs its computation only.

        Behind the array stands its sha256; older files have no digest and end with the array.
        """
        try:
            data = path.read_bytes()
            content, digest = data[:-32], data[-32:]
            buffer = io.BytesIO(content if hashlib.sha256(content).digest() == digest else data)
            array = np.load(buffer, allow_pickle=False)
            if buffer.read(1):
                raise ValueError("sha256 differs")
            return array
        except FileNotFoundError:
            return None
        except Exception as error:  # NumPy raises many kinds on a damaged head
            logger.warning("%s is damaged (%s): computed again", path, error)
            return None

    @staticmethod
    def _write(path: Path, features: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, features)
        content = buffer.getvalue()
        write_atomic(path, content + hashlib.sha256(content).digest())

    def load(self, num: int, batch_size: int) -> dict[int, np.ndarray]:
        """Read what is there of `num` clips: {first clip of a batch: features (B, D)}, possibly all or nothing."""
        # A finished run left one file.
        whole = self._read(self.whole)
        if whole is not None and len(whole) == num:
            return {start: whole[start : start + batch_size] for start in range(0, num, batch_size)}
        # An interrupted one left a file per batch.
        found = {}
        for start in range(0, num, batch_size):
            part = self._read(self._part(start))
            if part is not None and len(part) == min(batch_size, num - start):
                found[start] = part
        return found

    def _part(self, start: int) -> Path:
        return self.folder / f"{self.key[:32]}-{start:06d}.npy"

    def store(self, start: int, features: np.ndarray) -> None:
        """Keep the features of one batch."""
        self._write(self._part(start), features)

    def finish(self, features: np.ndarray, batch_size: int) -> None:
        """Keep all features in one file instead of the batches' files; another run may be doing the same."""
        whole = self._read(self.whole)
        if whole is None or len(whole) != len(features):
            self._write(self.whole, features)
        for start in range(0, len(features), batch_size):
            self._part(start).unlink(missing_ok=True)
