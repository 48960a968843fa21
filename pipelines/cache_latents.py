"""Stage two, first part: encode every clip once and keep the posterior's mean and log-variance.

    python -m pipelines.cache_latents --config configs/stage2/ucf101.yaml --vae odvae

Reads the settings of train_latte. The same command again continues where it stopped, and tries again what could not be
read; processes share the shards, also those of several launches at once. --verify checks a whole cache.
"""

import argparse
import hashlib
import itertools
import logging
import os
import platform
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.clip import to_float
from data.core.cli import run
from data.core.files import printable
from data.core.lazy import lazy
from data.decoder import BadVideo
from data.processes import Pool
from data.progress import Progress
from pipelines.beside import Beside, Waits
from pipelines.train_latte import FLAGS, TrainLatteConfig
from pipelines.training.config import parse
from pipelines.training.log import box, command
from pipelines.training.settings import Mode

torch = lazy("torch")
latent_files = lazy("data.latents")
latent_writer = lazy("data.latent_writer")
distributed = lazy("pipelines.training.distributed")
latents = lazy("pipelines.training.latents")
openers = lazy("pipelines.training.open")
plan = lazy("pipelines.plan.report")
programs = lazy("pipelines.plan.programs")
start = lazy("pipelines.training.start")

if TYPE_CHECKING:
    from data.dataset import VideoClips
    from data.latent_writer import LatentCacheWriter
    from data.latents import LatentCache

log = logging.getLogger(__name__)


def read_entries(
    config: TrainLatteConfig, clips: "VideoClips", entries: Iterable[int]
) -> Iterator[tuple[int, Any]]:
    """(entry, its pixels uint8 (T, size, size, 3), or the BadVideo that says why not), decoded ahead by `workers` processes.

    Both mirrored draws of a clip come from one reading, when they follow one another.
    """
    flips = config.cache.flips
    asked: deque[list[int]] = deque()  # entries of a reading that is on its way

    # Ask for the clips ahead, and remember which entries each answer serves.
    def jobs() -> Iterator[tuple]:
        for _, group in itertools.groupby(entries, lambda entry: entry // 2 if flips else entry):
            asked.append(list(group))
            video, draw = divmod(asked[-1][0], latents.draws(config))
            crop = draw // 2 if flips else draw
            yield clips.clip_job(video, np.random.default_rng((config.seed, video, crop)))

    # Without worker processes the reading happens here, in turn.
    def here(function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except BadVideo as error:
            return error

    # Hand each answer to its entries; the odd draws are the mirrored ones.
    with Pool(config.workers) if config.workers else nullcontext() as pool:
        for pixels in pool.in_order(jobs(), 2 * config.workers) if pool else (here(*one) for one in jobs()):
            for entry in asked.popleft():
                mirrored = flips and entry % 2 and not isinstance(pixels, BadVideo)
                yield entry, pixels[:, :, ::-1].copy() if mirrored else pixels


class Shard:
    """Rows of a shard as they come from the device, and the clips that could not be read."""

    def __init__(self, config: TrainLatteConfig, clips: "VideoClips"):
        self.config, self.clips, self.draws = config, clips, latents.draws(config)
        self.rows: list[tuple] = []
        self.failed: list[dict[str, Any]] = []

    def lacks(self, entry: int, error: BadVideo) -> None:
        """Note an entry whose video could not be read."""
        name = self.clips.name(entry // self.draws)
        self.failed.append({"entry": entry, "video": name, "reason": str(error)})
        log.warning("not cached: %s: %s", printable(name), error)

    def take(self, entries: list[int], posterior: Any) -> None:
        """Copy a batch's moments from the device. Raises ValueError for latents that are not finite."""
        dtype = latent_files.DTYPES[self.config.cache.dtype]
        mean, logvar = posterior.mean.float().cpu().to(dtype), posterior.logvar.float().cpu().to(dtype)
        for m, s, entry in zip(mean, logvar, entries, strict=True):
            if not (m.isfinite().all() and s.isfinite().all()):
                raise ValueError(
                    f"the latents of {self.clips.name(entry // self.draws)} are not finite: are the VAE's weights whole? "
                    "precision=fp32 and cache.dtype=float32 reach farther; the shards before are kept"
                )
            self.rows.append((m, s, entry))

    def tensors(self) -> dict[str, Any]:
        """mean, logvar, label, video, draw, a row for each encoded clip."""
        none = torch.zeros((0, 1, 1, 1, 1), dtype=latent_files.DTYPES[self.config.cache.dtype])
        means, logvars, entries = zip(*self.rows, strict=True) if self.rows else ((), (), ())
        # An entry's number says of which video it is, and which of its draws.
        entries = torch.tensor(entries, dtype=torch.int64)
        video, draw = entries // self.draws, entries % self.draws
        labels = list(map(self.clips.label, video.tolist()))
        return {
            "mean": torch.stack(means) if means else none,
            "logvar": torch.stack(logvars) if logvars else none,
            "video": video,
            "draw": draw,
            "label": torch.tensor(labels, dtype=torch.int64),
        }


def encode_shard(
    shard: Shard, vae: Any, read: Iterable[tuple[int, Any]], device: Any, beside: Beside
) -> None:
    """Encode the clips of a shard as they are read; `beside` copies the results while the next batch is computed.

    vae: on the device, as `for_inference` returns it.
    """
    good: list[tuple[int, np.ndarray]] = []

    def encode() -> None:
        entries, pixels = zip(*good, strict=True)
        x = to_float(distributed.send(torch.from_numpy(np.stack(pixels)), device)).to(vae.dtype)
        beside.do(shard.take, entries, vae.encode(x).latent_dist)
        good.clear()

    # Collect a batch of readable clips, encode it, and begin the next one.
    for entry, pixels in read:
        if isinstance(pixels, BadVideo):
            shard.lacks(entry, pixels)
            continue
        good.append((entry, pixels))
        if len(good) == shard.config.cache.batch:
            encode()
    if good:
        encode()


def shards_to_do(config: TrainLatteConfig, writer: "LatentCacheWriter", clips: "VideoClips") -> list[int]:
    """Shards that are missing, and those that lack a clip which can be read by now."""
    # Which clips could not be read before, and the shard of each
    lacking = {}
    for shard, failed in writer.failures().items():
        lacking |= {clip["entry"]: shard for clip in failed}
    # Whose reading succeeds now
    again = set()
    for entry, pixels in read_entries(config, clips, list(lacking)):
        if not isinstance(pixels, BadVideo):
            again.add(lacking[entry])
    if again:
        log.info("%d shards lack clips that can be read now: they are made again", len(again))
    return sorted([*writer.missing(), *again])


def my_share(todo: list[int], rank: int, world: int) -> list[int]:
    """This process's shards. It begins at a place of its own, so that two launches at once meet as late as possible."""
    mine = todo[rank::world]
    start = int(hashlib.sha256(f"{platform.node()}-{os.getpid()}".encode()).hexdigest(), 16) % max(
        1, len(mine)
    )
    return mine[start:] + mine[:start]


def build_cache(config: TrainLatteConfig) -> "LatentCache":
    """Encode what is missing; returns the complete cache. Measures the latents' mean and std per channel.

    index.json keeps them: training scales the latents of a VAE that brings no rule by them. The VAE's folder stays as it is.
    """
    # The VAE, the clips, and the folder that both name.
    accelerator = distributed.make_accelerator()
    main = accelerator.is_main_process
    vae, clips, fingerprint, folder = open_parts(config, accelerator)
    with distributed.main_process_first(accelerator):
        writer = latent_writer.LatentCacheWriter(
            folder, fingerprint, len(clips) * latents.draws(config), config.cache.shard_size
        )
    frozen = openers.for_inference(vae, accelerator.device, config.precision)
    # The shards of this process.
    todo = distributed.gathered(accelerator, shards_to_do(config, writer, clips) if main else [])
    log.info("%s: %d videos x %d draws", folder, len(clips), latents.draws(config))
    log.info("%d of %d shards to encode", len(todo), writer.num_shards)
    again = [s for s in todo if writer.is_written(s)]
    mine = my_share(todo, accelerator.process_index, accelerator.num_processes)
    # Read, encode and write at the same time: workers read ahead, a thread writes beside the device.
    waits = Waits()
    with (
        torch.inference_mode(),
        distributed.matrix_products(config),
        Progress(len(mine), "cache", "shard", main, note=lambda: str(waits)) as bar,
        Beside(waits, "writing") as beside,
    ):

        def entries() -> Iterator[int]:
            for number in mine:
                if number in again or not writer.is_written(number):
                    yield from writer.entries(number)
                else:  # another launch was quicker
                    bar.update()

        def write(number: int, shard: Shard) -> None:
            writer.write(number, shard.tensors(), shard.failed)

        # One shard after the other, as its clips come.
        with closing(read_entries(config, clips, entries())) as read:
            waited = waits.over(read, "videos")
            for number, group in itertools.groupby(waited, lambda one: one[0] // config.cache.shard_size):
                shard = Shard(config, clips)
                encode_shard(shard, frozen, group, accelerator.device, beside)
                beside.do(write, number, shard)
                bar.update()
    log.info("%s", waits)
    distributed.wait_for_all(accelerator)
    # The main process closes the cache: index, statistics, and what could not be read.
    if main:
        names = list(map(clips.name, range(len(clips))))
        most = config.source.max_failed_share
        index = writer.finish({"class_names": clips.source.class_names}, names, most)
        if index["failed"]:
            log.warning(
                "%d clips could not be read and are not in the cache; index.json lists them, the same command tries again",
                len(index["failed"]),
            )
        statistics = index["statistics"]
        log.info("latent mean %s, std %s", _short(statistics["mean"]), _short(statistics["std"]))
    distributed.wait_for_all(accelerator)
    return latent_files.LatentCache(folder, expect=fingerprint)


def open_parts(config: TrainLatteConfig, accelerator: Any) -> tuple[Any, "VideoClips", dict[str, Any], Path]:
    """(VAE, clips, fingerprint, folder) of a cache."""
    vae = openers.open_vae(config.vae)
    openers.check_clip(vae, config.clip)
    openers.check_scaling(vae, config.clip.num_frames)
    clips = distributed.open_everywhere(accelerator, lambda: latents.cached_clips(config))
    fingerprint = latents.cache_fingerprint(config, vae, clips)
    return vae, clips, fingerprint, latents.cache_folder(config, fingerprint)


def verify_cache(config: TrainLatteConfig) -> int:
    """Check every byte of a cache and that each clip is there once; prints the summary, returns how many shards are bad."""
    _, _, fingerprint, folder = open_parts(config, distributed.make_accelerator())
    cache = latent_files.LatentCache(folder, expect=fingerprint)
    damage = list(cache.verify())
    print("\n".join(damage), end="\n" if damage else "")
    print(
        f"{folder}: {len(cache)} clips in {len(cache.ends)} shards, {len(cache.index['failed'])} clips could not be read, "
        f"{len(damage)} shards damaged"
    )
    return len(damage)


def _short(values: list[float]) -> str:
    return "[" + ", ".join(f"{v:.3f}" for v in values) + "]"


def config_from(argv: list[str] | None) -> tuple[TrainLatteConfig, argparse.Namespace]:
    """The settings of a command line, and its switches."""
    verify = "check every shard of the cache, write nothing; exit code 1 if one is damaged"
    switches = {"--verify": verify}
    return parse(TrainLatteConfig, argv, "cache_latents", __doc__, FLAGS, switches, planned=True)


def main(argv: list[str] | None = None) -> int:
    config, args = config_from(argv)
    if args.plan:
        print(plan.plan_text("cache_latents", programs.cache, config, args.card))
        return 0
    if args.dry_run:
        print(start.describe_latte_run(config))
    elif config.mode is Mode.online:
        log.info("mode=online: nothing to cache")
    elif args.verify:
        return 1 if verify_cache(config) else 0
    else:
        cache, words = build_cache(config), sys.argv[1:] if argv is None else argv
        rows = {"latents": str(cache.folder), "check": command("cache_latents", *words, "--verify")}
        box(f"finished: {len(cache)} clips", rows | {"next": command("train_latte", *words)})
    return 0


if __name__ == "__main__":
    run(main)
