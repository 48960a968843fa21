"""The latent cache: posterior moments of clips, written once, read at random; a folder of safetensors shards.

    index.json             fingerprint (VAE weights, ClipSpec, source, draws, dtype), statistics, complete: true
    latents-00003.safetensors   mean, logvar (N, C, t, h, w); label, video, draw (N,) int64
    latents-00003.json     sha256, number of rows, clips that failed with the reason; written after its shard

A cut of a long latent is not the latent of the cut clip (the first latent stands for one frame), so each entry is the
encoding of one explicit clip: entry k = draw k % D of video k // D, D = crops x (2 when both flips are stored).
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.files import fsync, sha256_of, write_json

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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


class LatentCacheWriter:
    """Writes a cache shard by shard. Shards are independent, so any number of processes may share the work.

    num_entries: videos x draws; shard_size: entries a shard. A folder with another fingerprint is refused.
    """

    def __init__(
        self, folder: str | Path, fingerprint: dict[str, Any], num_entries: int, shard_size: int = 256
    ):
        self.folder, self.num_entries, self.shard_size = Path(folder), num_entries, shard_size
        self.folder.mkdir(parents=True, exist_ok=True)
        index_file = self.folder / "index.json"
        header = {
            "fingerprint": fingerprint,
            "num_entries": num_entries,
            "shard_size": shard_size,
            "complete": False,
        }
        if index_file.is_file():
            old = _read_index(self.folder)
            _refuse_other(self.folder, old["fingerprint"], fingerprint)
            if (old["num_entries"], old["shard_size"]) != (num_entries, shard_size):
                raise ValueError(
                    f"cache {self.folder} was begun with {old['num_entries']} entries in shards of {old['shard_size']}, "
                    f"now {num_entries} in shards of {shard_size}; choose another cache folder"
                )
        else:
            write_json(index_file, header)

    @property
    def num_shards(self) -> int:
        return -(-self.num_entries // self.shard_size)

    def entries(self, shard: int) -> range:
        """Entry numbers of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_entries))

    def missing(self) -> list[int]:
        """Shards not yet complete (a shard without its .json was interrupted, or is being written by another process)."""
        files = [(_shard(self.folder, s), _sidecar(self.folder, s)) for s in range(self.num_shards)]
        return [s for s, pair in enumerate(files) if not all(file.is_file() for file in pair)]

    def write(self, shard: int, tensors: dict[str, torch.Tensor], failed: list[dict[str, Any]]) -> None:
        """tensors: mean, logvar, label, video, draw with one row per encoded clip; failed: {entry, video, reason}."""
        path = _shard(self.folder, shard)
        temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            size = sum(v.numel() * v.element_size() for v in tensors.values())
            raise OSError(f"cannot write {path} ({size:,} bytes): {error}") from error
        fsync(temporary)
        record = {"sha256": sha256_of(temporary), "rows": len(tensors["label"]), "failed": failed}
        os.replace(temporary, path)
        write_json(_sidecar(self.folder, shard), record)

    def finish(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Seal a cache whose shards are all there: statistics per channel, counts, complete: true."""
        if self.missing():
            raise ValueError(
                f"cache {self.folder}: {len(self.missing())} of {self.num_shards} shards are missing"
            )
        index = _read_index(self.folder)
        if index["complete"]:
            return index
        records = [json.loads(_sidecar(self.folder, s).read_text()) for s in range(self.num_shards)]
        failed = [f for r in records for f in r["failed"]]
        if not sum(r["rows"] for r in records):
            raise ValueError(
                f"cache {self.folder}: every clip failed, first: {failed[0]['reason'] if failed else '?'}"
            )
        index |= {"complete": True, "failed": failed, "rows": [r["rows"] for r in records]}
        index |= {"statistics": latent_statistics(self.folder, self.num_shards), **extra}
        write_json(self.folder / "index.json", index)
        return index


def _shard(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"


def _sidecar(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.json"


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no latent cache (no index.json); make one: python -m pipelines.cache_latents"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{folder}/index.json is damaged ({error}); remove the folder and cache again"
        ) from error


def _refuse_other(folder: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    lines = differences(have, want)
    if lines:
        raise ValueError(
            f"cache {folder} was made otherwise ({'; '.join(lines[:4])}); choose another cache folder"
        )


def latent_statistics(folder: Path, num_shards: int) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of posterior samples: E[z] = E[mean], E[z^2] = E[mean^2 + var], float64."""
    count, first, second = 0, 0.0, 0.0
    for shard in range(num_shards):
        with safe_open(_shard(folder, shard), "pt") as file:
            mean, logvar = file.get_tensor("mean").double(), file.get_tensor("logvar").double()
        if not len(mean):
            continue
        axes = [d for d in range(mean.ndim) if d != 1]
        count += mean.numel() // mean.shape[1]
        first = first + mean.sum(axes)
        second = second + (mean.square() + logvar.exp()).sum(axes)
    mean, std = first / count, (second / count - (first / count).square()).clamp_min(0).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist()}


class LatentCache:
    """Random access to a complete cache. `cache[k]` is row k: mean, logvar (C, t, h, w) float32, label, video, draw.

    expect: a fingerprint the cache must have. Each shard's sha256 is checked when it is first opened, so a damaged one is
    named instead of trained on. Safe to hand to worker processes: files are opened after the fork.
    """

    def __init__(self, folder: str | Path, expect: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        if expect is not None:
            _refuse_other(self.folder, self.index["fingerprint"], expect)
        if not self.index["complete"]:
            raise ValueError(
                f"cache {self.folder} is not complete; run the same cache_latents command again to go on"
            )
        self.ends = np.cumsum(self.index["rows"])
        self._open: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.index["fingerprint"]

    def verify(self) -> Iterator[str]:
        """One line for every damaged or missing shard; nothing when all are as written."""
        for shard in range(len(self.ends)):
            try:
                self._check(shard)
            except ValueError as error:
                yield str(error)

    def _check(self, shard: int) -> None:
        path = _shard(self.folder, shard)
        try:
            intact = sha256_of(path) == json.loads(_sidecar(self.folder, shard).read_text())["sha256"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"latent shard {path}: {error}") from error
        if not intact:
            raise ValueError(
                f"latent shard {path} is damaged (sha256); delete it and its .json and cache again"
            )

    def _slices(self, shard: int) -> dict[str, Any]:
        if shard not in self._open:
            self._check(shard)
            file = safe_open(_shard(self.folder, shard), "pt")
            self._open[shard] = {
                name: file.get_slice(name) for name in ("mean", "logvar", "label", "video", "draw")
            }
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __getitem__(self, k: int) -> dict[str, Any]:
        if not 0 <= k < len(self):
            raise IndexError(f"row {k}: the cache has {len(self)}")
        shard = int(np.searchsorted(self.ends, k, side="right"))
        row = k - (int(self.ends[shard - 1]) if shard else 0)
        slices = self._slices(shard)
        item = {name: slices[name][row : row + 1][0] for name in slices}
        return {n: v.float() if v.is_floating_point() else int(v) for n, v in item.items()}


class LatentStream:
    """The cache as an endless, shuffled stream: sample n is a pure function of (seed, n), so resuming = starting at n."""

    def __init__(self, cache: LatentCache, seed: int = 0):
        self.cache, self.seed = cache, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, n: int) -> dict[str, Any]:
        epoch, position = divmod(n, len(self.cache))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.cache)))
        return self.cache[int(self._order[1][position])] | {"number": n}
