"""Writing the latent cache (its layout: latents.py), by any number of processes and machines at once, without a lock.

Shards are independent, written whole and renamed; two processes that encode the same shard write the same bytes.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.core.files import (
    fsync,
    remove_leftovers,
    sha256_of,
    temporary_name,
    usual_mode,
    write_atomic,
    write_json,
)
from data.latents import names_file, read_index, read_sidecar, refuse_other, shard_file, sidecar_file


class LatentCacheWriter:
    """Writes a cache shard by shard.

    num_entries: videos x draws; shard_size: entries a shard. A folder with another fingerprint is refused.
    """

    def __init__(
        self, folder: str | Path, fingerprint: dict[str, Any], num_entries: int, shard_size: int = 256
    ):
        self.folder, self.num_entries, self.shard_size = Path(folder), num_entries, shard_size
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        # A cache that was begun must be this one; a folder of anything else is left alone.
        index_file = self.folder / "index.json"
        header = {
            "fingerprint": fingerprint,
            "num_entries": num_entries,
            "shard_size": shard_size,
            "complete": False,
        }
        if index_file.is_file():
            old = read_index(self.folder)
            refuse_other(self.folder, old["fingerprint"], fingerprint)
            if (old["num_entries"], old["shard_size"]) != (num_entries, shard_size):
                raise ValueError(
                    f"cache {self.folder} was begun with {old['num_entries']} entries in shards of {old['shard_size']}, "
                    f"now {num_entries} in shards of {shard_size}; choose another cache folder"
                )
        elif any(not _may_be_ours(p) for p in self.folder.iterdir()):
            raise ValueError(
                f"cache {self.folder} holds other files and is not a cache; choose another cache folder"
            )
        elif any(self.folder.glob("latents-*")):
            raise ValueError(
                f"cache {self.folder} has shards but no index.json, so nobody knows what they hold; remove the folder"
            )
        else:
            write_json(index_file, header)

    @property
    def num_shards(self) -> int:
        return -(-self.num_entries // self.shard_size)

    def entries(self, shard: int) -> range:
        """Entry numbers of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_entries))

    def is_written(self, shard: int) -> bool:
        """Whether a shard is complete: one without its .json was interrupted, or is being written by another process."""
        return shard_file(self.folder, shard).is_file() and sidecar_file(self.folder, shard).is_file()

    def missing(self) -> list[int]:
        """Shards not yet complete."""
        return [s for s in range(self.num_shards) if not self.is_written(s)]

    def failures(self) -> dict[int, list[dict[str, Any]]]:
        """{shard: its clips that could not be read} of the complete shards that lack some."""
        written = [s for s in range(self.num_shards) if self.is_written(s)]
        failed = {s: read_sidecar(self.folder, s)["failed"] for s in written}
        return {s: clips for s, clips in failed.items() if clips}

    def write(self, shard: int, tensors: dict[str, torch.Tensor], failed: list[dict[str, Any]]) -> None:
        """tensors: mean, logvar, label, video, draw with one row per encoded clip; failed: {entry, video, reason}."""
        path, sidecar = shard_file(self.folder, shard), sidecar_file(self.folder, shard)
        # The shard under another name, then its record, then both in their places.
        temporary = temporary_name(path)
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            usual_mode(temporary)
            fsync(temporary)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            size = sum(v.numel() * v.element_size() for v in tensors.values())
            raise OSError(f"cannot write {path} ({size:,} bytes): {error}") from error
        record = {"sha256": sha256_of(temporary), "rows": len(tensors["label"]), "failed": failed}
        if sidecar.is_file() and read_sidecar(self.folder, shard)["sha256"] != record["sha256"]:
            sidecar.unlink()  # a kill between the two renames must leave a missing shard, not one that looks damaged
        os.replace(temporary, path)
        write_json(sidecar, record)

    def finish(
        self, extra: dict[str, Any], names: Sequence[str] = (), max_failed_share: float = 1.0
    ) -> dict[str, Any]:
        """Seal a cache whose shards are all there: statistics per channel, counts, complete: true; names of its videos.

        Raises ValueError if shards are missing, or if more than max_failed_share of the clips could not be read, unless the
        cache was sealed with as many before.
        """
        if self.missing():
            raise ValueError(
                f"cache {self.folder}: {len(self.missing())} of {self.num_shards} shards are missing"
            )
        if names and not names_file(self.folder).is_file():
            lines = (json.dumps({"name": name}) + "\n" for name in names)
            write_atomic(names_file(self.folder), "".join(lines))
        index = read_index(self.folder)
        # What is in it and what could not be read; nothing to do if that is sealed already.
        records = [read_sidecar(self.folder, s) for s in range(self.num_shards)]
        rows, failed = [r["rows"] for r in records], [f for r in records for f in r["failed"]]
        if index["complete"] and (index["rows"], index["failed"]) == (rows, failed):
            return index
        if not sum(rows):
            raise ValueError(
                f"cache {self.folder}: every clip failed, first: {failed[0]['reason'] if failed else '?'}"
            )
        share, sealed = len(failed) / self.num_entries, len(index["failed"]) if index["complete"] else 0
        if share > max_failed_share and len(failed) > sealed:
            raise ValueError(
                f"cache {self.folder}: {len(failed)} of {self.num_entries} clips ({share:.1%}) could not be read, first: "
                f"{failed[0]['video']}: {failed[0]['reason']}; bring them back, and the same command tries them again, or allow "
                f"more with source.max_failed_share={min(1.0, 2 * share):.2g}"
            )
        index |= {"complete": True, "failed": failed, "rows": rows}
        index |= {"statistics": latent_statistics(self.folder, self.num_shards), **extra}
        write_json(self.folder / "index.json", index)
        return index


def _may_be_ours(path: Path) -> bool:
    """Whether a file of a folder without an index may be a cache's: its names are told from a list of the user's own."""
    if path.name != "videos.jsonl":
        return path.name.startswith((".", "latents-"))
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError, RecursionError):
        return False
    return lines != [] and all(isinstance(line, dict) and line.keys() == {"name"} for line in lines)


def latent_statistics(folder: Path, num_shards: int) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of posterior samples: E[z] = E[mean], E[z^2] = E[mean^2 + var], float64."""
    count, first, second = 0, 0.0, 0.0
    for shard in range(num_shards):
        with safe_open(shard_file(folder, shard), "pt") as file:
            mean, logvar = file.get_tensor("mean").double(), file.get_tensor("logvar").double()
        if not len(mean):
            continue
        axes = [d for d in range(mean.ndim) if d != 1]
        count += mean.numel() // mean.shape[1]
        first = first + mean.sum(axes)
        second = second + (mean.square() + logvar.exp()).sum(axes)
    mean, std = first / count, (second / count - (first / count).square()).clamp_min(0).sqrt()
    return {"mean": mean.tolist(), "std": std.tolist()}
