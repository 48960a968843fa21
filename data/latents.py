"""The latent cache: posterior moments of clips, written once (latent_writer.py), read at random; safetensors shards.

    index.json             fingerprint (VAE weights, ClipSpec, source, draws, dtype), statistics, complete: true
    latents-00003.safetensors   mean, logvar (N, C, t, h, w); label, video, draw (N,) int64
    latents-00003.json     sha256, number of rows, clips that failed with the reason; written after its shard
    videos.jsonl           line v: {"name": ...} of video v, its path below the root of its source (older caches lack it)

A cut of a long latent is not the latent of the cut clip (the first latent stands for one frame), so each entry is the
encoding of one explicit clip: entry k = draw k % D of video k // D, D = crops x (2 when both flips are stored).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.core.files import sha256_of, write_atomic

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def fingerprint_id(fingerprint: dict[str, Any]) -> str:
    """sha256 over the canonical JSON of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def differences(have: dict[str, Any], want: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: have -> want" for what differs between two fingerprints."""
    lines = []
    for key in sorted(have.keys() | want.keys()):
        a, b = have.get(key), want.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} in the cache, {b!r} asked for")
    return lines


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"


def sidecar_file(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.json"


def names_file(folder: Path) -> Path:
    return folder / "videos.jsonl"


def read_sidecar(folder: Path, shard: int) -> dict[str, Any]:
    """sha256, rows and failed clips of a shard; ValueError when its record is missing or damaged."""
    path = sidecar_file(folder, shard)
    try:
        record = json.loads(path.read_text())
        return {
            "sha256": str(record["sha256"]),
            "rows": int(record["rows"]),
            "failed": list(record["failed"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing or damaged ({error!r}); {_way_out(folder, shard)}") from error


def _way_out(folder: Path, shard: int) -> str:
    name = shard_file(folder, shard).name
    return f"delete {name} and its .json and run the same cache_latents command again: it makes them again"


def read_index(folder: Path) -> dict[str, Any]:
    """index.json; ValueError when it is missing or damaged."""
    try:
        index = json.loads((folder / "index.json").read_text())
        lacking = {"fingerprint", "num_entries", "shard_size", "complete"} - index.keys()
        if index.get("complete"):
            lacking |= {"rows", "failed", "statistics"} - index.keys()
        if lacking:
            raise ValueError(f"lacks {', '.join(sorted(lacking))}")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is not a latent cache (index.json not found); make one: python -m pipelines.cache_latents"
        ) from None
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder}/index.json is damaged ({error}); remove the folder and cache again"
        ) from error
    return index


def refuse_other(folder: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    """ValueError with the differences when two fingerprints are not the same."""
    lines = differences(have, want)
    if lines:
        raise ValueError(
            f"cache {folder} was made otherwise ({'; '.join(lines[:4])}); choose another cache folder"
        )


class LatentCache:
    """Random access to a complete cache. `cache[k]` is row k: mean, logvar (C, t, h, w) float32, label, video, draw;
    `cache.batch(rows)` several of them, stacked, in the dtype of the file.

    expect: a fingerprint the cache must have. Each shard's sha256 is checked when it is first read, and every row against
    what it was then, so one that is damaged, or changes meanwhile, is named instead of trained on. A shard that has not
    been written to since the last check is not read through again (--verify of cache_latents does). Threads may share it.
    """

    def __init__(self, folder: str | Path, expect: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if expect is not None:
            refuse_other(self.folder, self.index["fingerprint"], expect)
        if not self.index["complete"]:
            raise ValueError(
                f"cache {self.folder} is not complete; run the same cache_latents command again to continue"
            )
        self.ends = np.cumsum(self.index["rows"])
        self._open: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.index["fingerprint"]

    def verify(self) -> Iterator[str]:
        """One line for every damaged or missing shard and every clip that is not there once; nothing when all is well."""
        # As many shards as the clips make, names of all videos, then every byte and every clip of each shard.
        size, total = self.index["shard_size"], self.index["num_entries"]
        if len(self.ends) != -(-total // size):
            yield f"{self.folder}/index.json: {len(self.ends)} shards, {total} clips make {-(-total // size)}"
        try:
            if self.video_names and len(self.video_names) != (videos := self.fingerprint["source"]["videos"]):
                yield f"{names_file(self.folder)}: {len(self.video_names)} names of {videos} videos; remove it and cache again"
        except ValueError as error:
            yield str(error)
        for shard in range(len(self.ends)):
            try:
                record = self._check(shard, again=True)
                ids = self._open[shard].ids
                entries = ids["video"] * self.draws + ids["draw"]
                entries = np.append(entries, [f["entry"] for f in record["failed"]]).astype(np.int64)
            except ValueError as error:
                yield str(error)
                continue
            wanted = range(shard * size, min((shard + 1) * size, total))
            if sorted(entries) != list(wanted):
                yield f"latent shard {shard_file(self.folder, shard)}: clips missing or double; {_way_out(self.folder, shard)}"

    @functools.cached_property
    def video_names(self) -> list[str]:
        """Name of each video, its path below the root of its source; [] of a cache that was made before names were kept."""
        file = names_file(self.folder)
        try:
            lines = file.read_text().splitlines() if file.is_file() else []
            return [str(json.loads(line)["name"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}); remove it and run the same cache_latents command again"
            ) from error

    @property
    def draws(self) -> int:
        """Entries of one video."""
        drawn = self.fingerprint["draws"]
        return drawn["crops"] * (2 if drawn["flips"] else 1)

    def _check(self, shard: int, again: bool = False) -> dict[str, Any]:
        """The shard's record; ValueError that names the shard and the way out when it is damaged or missing."""
        path, record = shard_file(self.folder, shard), read_sidecar(self.folder, shard)
        if record["rows"] != self.index["rows"][shard]:
            raise ValueError(
                f"latent shard {path} has {record['rows']} rows, index.json says {self.index['rows'][shard]}; run the same "
                "cache_latents command again: an earlier one did not end"
            )
        try:
            self._open[shard] = _Shard(path, record, again)
        except OSError as error:
            raise ValueError(f"latent shard {path}: {error}; {_way_out(self.folder, shard)}") from error
        except ValueError as error:
            raise ValueError(f"latent shard {path}{error}; {_way_out(self.folder, shard)}") from error
        return record

    def _shard(self, shard: int) -> _Shard:
        if shard not in self._open:
            self._check(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __getitem__(self, k: int) -> dict[str, Any]:
        batch = self.batch([k])
        moments = {name: batch[name][0].float() for name in MOMENTS}
        return moments | {name: int(batch[name]) for name in IDS}

    def batch(self, rows: Sequence[int], each: Callable = map) -> dict[str, torch.Tensor]:
        """Read rows, each straight into its place: mean, logvar (n, C, t, h, w) as stored; label, video, draw (n,) int64.

        each: a `map` that reads the rows, for example that of a pool of threads. IndexError beyond the end, ValueError for a
        damaged row, or one of another shape than the first.
        """
        found = [self._find(k) for k in rows]
        dtype, shape = found[0][0].layout
        batch = {name: torch.empty(len(found), *shape, dtype=dtype) for name in MOMENTS}
        # The same memory as bytes, one row of them for each row of the cache.
        bytes_of = [batch[name].view(len(found), -1).view(torch.uint8).numpy() for name in MOMENTS]

        def read(n: int) -> None:
            shard, row = found[n]
            try:
                if shard.layout != (dtype, shape):
                    raise OSError(f"row {row} is {shard.layout}, another one {(dtype, shape)}")
                shard.read(row, [column[n] for column in bytes_of])
            except OSError as error:
                number = bisect.bisect_right(self.ends, rows[n])
                raise ValueError(
                    f"latent shard {shard.path}: {error}; {_way_out(self.folder, number)}"
                ) from error

        for _ in each(read, range(len(found))):
            pass
        return batch | {
            name: torch.tensor([int(shard.ids[name][row]) for shard, row in found]) for name in IDS
        }

    def _find(self, k: int) -> tuple[_Shard, int]:
        """The shard that holds row k, and its place in it."""
        if not 0 <= k < len(self):
            raise IndexError(f"row {k}: the cache has {len(self)}")
        shard = bisect.bisect_right(self.ends, k)
        return self._shard(shard), k - (int(self.ends[shard - 1]) if shard else 0)


MOMENTS, IDS = ("mean", "logvar"), ("label", "video", "draw")


class _Shard:
    """Rows of a safetensors file, read one at a time: a mapped file that is cut short would end the process.

    layout: dtype and shape of a row of each moment. Raises ValueError if the file is not the one of its record or no
    shard; `read` OSError if a row has changed since.
    """

    def __init__(self, path: Path, record: dict[str, Any], again: bool):
        """again: read it through even if a note of an earlier check fits."""
        self.path = path
        found = path.stat()
        now = f"words {found.st_size} {found.st_mtime_ns} {record['sha256']}"
        place = hashlib.sha256(bytes(path.resolve())).hexdigest()
        note = Path(tempfile.gettempdir(), f"omnilatte-{os.getuid()}", place)
        sums = None if again else _noted(note, now)
        if sums is None and sha256_of(path) != record["sha256"]:
            raise ValueError(" is damaged (sha256)")
        try:
            self._take(record["rows"], sums)
        except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f": no shard of latents ({type(error).__name__}: {str(error)[:60]})") from error
        if sums is None:
            with contextlib.suppress(OSError):  # then each process looks for itself
                write_atomic(
                    note, json.dumps({"of": now, "sums": dict(zip(MOMENTS, self.sums, strict=True))})
                )

    def _take(self, rows: int, sums: dict[str, list[int]] | None) -> None:
        """Set layout, ids, and for each moment the place of its first row and the checksums of all (sums: known ones)."""
        self.ids, self.starts, self.sums = {}, [], []
        with open(self.path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length) if length < 1 << 20 else b"")
            self.layout = TYPES[header["mean"]["dtype"]], tuple(header["mean"]["shape"][1:])
            if not all(isinstance(n, int) and n > 0 for n in self.layout[1]):
                raise ValueError(f"rows of shape {self.layout[1]}")
            self.size = self.layout[0].itemsize * math.prod(self.layout[1])
            file_end = os.fstat(file.fileno()).st_size
            for name in (*MOMENTS, *IDS):
                start, end = (8 + length + place for place in header[name]["data_offsets"])
                found = TYPES[header[name]["dtype"]], tuple(header[name]["shape"][1:])
                wanted, size = (self.layout, self.size) if name in MOMENTS else ((torch.int64, ()), 8)
                if found != wanted or end - start != rows * size or not 0 < start <= end <= file_end:
                    raise ValueError(f"{name}: {found} in {end - start} bytes")
                file.seek(start)
                if name in IDS:
                    self.ids[name] = np.frombuffer(file.read(end - start), np.int64)
                else:
                    self.starts.append(start)
                    self.sums.append(sums[name] if sums else [_sum(file.read(size)) for _ in range(rows)])

    def read(self, row: int, into: Sequence[np.ndarray]) -> None:
        """Fill the bytes of a row's moments."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            for data, start, sums in zip(into, self.starts, self.sums, strict=True):
                if os.preadv(handle, [data], start + row * self.size) != self.size or _sum(data) != sums[row]:
                    raise OSError(f"row {row} has changed since the shard was checked")
        finally:
            os.close(handle)


def _sum(data: Any) -> int:
    """A checksum at the speed of memory: the sum of the words, and of the bytes behind the last whole one."""
    data = np.frombuffer(data, np.uint8)
    whole = len(data) // 8 * 8
    words = int(np.add.reduce(data[:whole].view(np.uint64)))
    return words + int(data[whole:].sum(dtype=np.uint64)) if whole < len(data) else words


def _noted(note: Path, now: str) -> dict[str, list[int]] | None:
    """The checksums of the rows, if a check of the very file left them."""
    try:
        content = json.loads(note.read_text())
        return content["sums"] if content["of"] == now else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class LatentStream:
    """The cache as an endless, shuffled stream: sample n is a pure function of (seed, n), so resuming = starting at n.

    Moments come in the dtype in which they are stored: half the bytes to copy, pin and send; the trainer widens them.
    """

    def __init__(self, cache: LatentCache, seed: int = 0):
        self.cache, self.seed = cache, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return len(self.cache)

    def batch(self, numbers: Sequence[int], each: Callable = map) -> dict[str, torch.Tensor]:
        """Samples of these numbers, stacked (LatentCache.batch); number (n,) int64."""
        return self.cache.batch([self._row(n) for n in numbers], each) | {"number": torch.tensor(numbers)}

    def _row(self, n: int) -> int:
        epoch, position = divmod(n, len(self.cache))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.cache)))
        return int(self._order[1][position])
