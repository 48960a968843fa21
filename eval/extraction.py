"""From selected clips to features: decoded in worker processes, a batch at a time, by any number of processes.

Batch j holds the same clips whatever the number of processes; process r of W takes the batches r, r + W, ...; there
is no padding. Results are gathered, sorted and checked to cover each clip once. Memory holds a few clips, not the
set: at most QUEUE_BYTES of decoded clips wait for the network.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from data.core.lazy import lazy
from data.decoder import BadVideo
from data.finding import natural_key
from data.processes import Pool
from data.progress import Progress
from eval.feature_cache import FeatureCache
from eval.selection import Clip, Selection
from eval.videos import content_digest, read_clip

feature_networks = lazy("eval.features")
torch = lazy("torch")

# ---- processes of one judge -----------------------------------------------------------------------------


PATIENCE = timedelta(hours=12)  # one process may scan a large set while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are. group: the gloo group, None when alone."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: Any) -> list:
        """Gather the values of all processes, in the order of their ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def everywhere(self, fn: Callable[[], Any]) -> list:
        """Call fn() in all processes, gather the results.

        If it raises ValueError or OSError in one, it is raised in all.
        """
        result, error = None, None
        try:
            result = fn()
        except (ValueError, OSError) as raised:
            error = raised
        if self.world == 1:
            if error:
                raise error
            return [result]
        # All take part in the gathering, whether fn() failed or not: otherwise the others would wait for ever.
        gathered = self.all_gather((result, None if error is None else f"{error}"))
        for rank, (_, message) in enumerate(gathered):
            if message is not None:
                raise error if error is not None and rank == self.rank else ValueError(message)
        return [value for value, _ in gathered]

    def from_main(self, fn: Callable[[], Any]) -> Any:
        """Call fn() in rank 0 and return its result in all processes; raise its ValueError or OSError in all too."""
        return self.everywhere(lambda: fn() if self.main else None)[0]


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes of a torchrun or accelerate launch, or of a group that exists already; else one alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    import torch.distributed as dist

    # A trainer's group may be one of GPUs; objects are gathered by the CPU.
    if dist.is_available() and dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)
        return
    if world == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


# ---- extraction -----------------------------------------------------------------------------------------


logger = logging.getLogger(__name__)
QUEUE_BYTES = 512 << 20
FRAMES_PER_BATCH = 128


@dataclass(frozen=True)
class RunOptions:
    """How features are computed, which should not change them. batch_size: None is 128 frames' worth of clips.

    workers: decoding processes, 0 decodes in this one. cache: folder, None keeps nothing.
    """

    batch_size: int | None = None
    workers: int = 1
    cache: Path | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: at least 1")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: 0 or more processes")

    def batch_of(self, num_frames: int) -> int:
        return self.batch_size or max(1, FRAMES_PER_BATCH // num_frames)


def _read(clip: Clip, size: tuple[int, int]) -> np.ndarray | str:
    """Read a clip's pixels, or say in one line why it cannot be read."""
    try:
        return read_clip(clip.video, np.array(clip.indices), size, clip.source, clip.times)
    except ValueError as error:
        return " ".join(str(error).split()) or type(error).__name__


def _read_ahead(clips: Sequence[Clip], size: tuple[int, int], workers: int) -> Iterator[np.ndarray | str]:
    """Yield the clips' pixels in order, decoded ahead by `workers` processes within QUEUE_BYTES."""
    clip_bytes = len(clips[0].indices) * size[0] * size[1] * 3 if clips else 1
    ahead = max(1, min(4 * workers, QUEUE_BYTES // clip_bytes))
    workers = min(workers, ahead, len(clips))
    if not workers:
        for clip in clips:
            yield _read(clip, size)
        return
    with Pool(workers) as pool:
        read = pool.in_order(((_read, clip, size) for clip in clips), ahead)
        for clip, pixels in zip(clips, read, strict=True):
            # What the pool says about a worker that died, or took too long, lacks the name.
            yield f"{clip.video.name}: {pixels}" if isinstance(pixels, BadVideo) else pixels


def extract_selected(
    clips: Sequence[Clip],
    size: tuple[int, int],
    extractor,
    options: RunOptions,
    cache: FeatureCache | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[np.ndarray | None, dict[int, str]]:
    """Compute the features of clips, in their order, the same in every process; collective when there are several.

    size: (height, width) of the pixels the network's preprocessing gets. Returns ((N, D) float32, {}), or
    (None, {index of a clip: why it cannot be read}).
    """
    ranks, step = options.ranks, options.batch_of(len(clips[0].indices))
    # What an earlier run left in the cache, and this process's share of the other batches.
    pieces = ranks.from_main(lambda: cache.load(len(clips), step) if cache else {})
    todo = [start for start in range(0, len(clips), step) if start not in pieces]
    mine = todo[ranks.rank :: ranks.world]
    if on_batch is not None:
        on_batch(sum(map(len, pieces.values())))
    parts = ranks.everywhere(
        lambda: _extract_batches(clips, size, mine, step, extractor, options.workers, cache, on_batch)
    )
    # Gather; all processes see all failures and batches.
    failures = {}
    for found, failed in parts:
        failures |= failed
        pieces |= found
    if failures:
        return None, failures
    # Put the batches in order and check that they cover each clip once.
    covered = 0
    for start in sorted(pieces):
        assert start == covered, "each clip is judged exactly once"
        covered += len(pieces[start])
    assert covered == len(clips), "each clip is judged exactly once"
    features = np.concatenate([pieces[start] for start in sorted(pieces)])
    if cache and ranks.main:
        cache.finish(features, step)
    return features, {}


def _extract_batches(
    clips, size, starts, step, extractor, workers, cache, on_batch
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """Compute the batches that begin at `starts`: ({start: features}, {index: why a clip cannot be read})."""
    found, failures, wanted = {}, {}, []
    for start in starts:
        wanted += clips[start : start + step]
    pixels = _read_ahead(wanted, size, workers)
    for start in starts:
        batch = [next(pixels) for _ in clips[start : start + step]]
        for index, clip in enumerate(batch, start):
            if isinstance(clip, str):
                failures[index] = clip
        if failures:
            continue  # the batch will be made again with other clips in their places
        found[start] = feature_networks.extract_features(batch, extractor, step)
        if cache:
            cache.store(start, found[start])
        if on_batch is not None:
            on_batch(len(batch))
    return found, failures


@dataclass(frozen=True)
class Judged:
    """Features (N, D) float32 of a folder's clips, and the record's summary.

    groups: (N,) a number for the video each clip is from. places: (N,) the clip's place by name of its video.
    """

    features: np.ndarray
    groups: np.ndarray
    places: np.ndarray
    summary: dict


def judge_folder(
    selection: Selection | None,
    num: int,
    size: tuple[int, int],
    extractor,
    options: RunOptions,
    more: int = 0,
    text: str = "",
) -> Judged:
    """Compute the features of exactly `num` clips, and of `more` after them if the folder has that many; collective.

    selection: in rank 0, None elsewhere. A clip that cannot be read after all is replaced and counted.
    Raises ValueError if there are fewer than `num` clips.
    """
    ranks = options.ranks
    # Until a choice of clips can be read to its end: a video that fails is rejected, and others take its places.
    while True:
        clips, cache = ranks.from_main(lambda: _plan(selection, num, more, size, extractor, options))
        with Progress(len(clips), text, "video", ranks.main and bool(text)) as bar:
            features, failures = extract_selected(clips, size, extractor, options, cache, bar.update)
        if features is not None:
            break
        if ranks.main:
            for index, reason in failures.items():
                selection.reject(clips[index].video, reason)
    # Number the videos, for intervals (all clips of one are drawn together); rank the clips by name, for IS.
    numbers: dict = {}
    groups = np.array([numbers.setdefault(clip.video, len(numbers)) for clip in clips])
    by_name = sorted(range(len(clips)), key=lambda n: (natural_key(clips[n].video.name), clips[n].indices))
    places = np.argsort(by_name)
    summary = ranks.from_main(lambda: selection.summary(clips[:num]))
    return Judged(features, groups, places, summary)


def _plan(
    selection: Selection, num: int, more: int, size: tuple[int, int], extractor, options: RunOptions
) -> tuple[list[Clip], FeatureCache | None]:
    """Choose the clips to judge, and say where their features are kept."""
    # More clips are welcome, not needed: they are for the floor.
    clips = selection.take(num)
    if more:
        try:
            clips = selection.take(num + more)
        except ValueError as error:
            logger.info("no second set of %d real clips: %s", more, error)
    if options.cache is None:
        return clips, None
    # What decides the features; a change of any of it is another file of the cache.
    content = {
        "clips": [[content_digest(clip.video), clip.indices] for clip in clips],
        "size": size,
        "batch_size": options.batch_of(len(clips[0].indices)),
        "device": extractor.device.type,
        "torch": torch.__version__,
        "weights": extractor.provenance.as_dict(),
        **extractor.settings,
    }
    return clips, FeatureCache(options.cache, content)
