"""Several sources as one stream with fixed shares: the 440k web videos and Kinetics-400 of stage one (paper 4)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from data.core.lazy import lazy
from data.dataset import Attempts, made_here
from data.sources import Source

torch = lazy("torch")

if TYPE_CHECKING:
    from data.clip import ClipSpec
    from data.dataset import VideoClips

BLOCK = 64  # samples that are shuffled among each other
# Samples after which the shares are exact; a weight is rounded to a multiple of 1 / CYCLE.
CYCLE = 1024 * BLOCK


def part_seed(seed: int, name: str) -> int:
    """Make the seed of one source of a mixture: others that come or go do not change its order or its clips."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


class Shares:
    """Which source sample n of the stream belongs to, and its index within that source.

    A pure function of (seed, n). After every multiple of 64 samples each source has had its share to within one
    sample; between two of them the order is random, lest a source always meets the same half of a step.
    """

    def __init__(self, weights: Sequence[float], seed: int = 0):
        """Share out by weights: one per source, above 0, in any unit. Raises ValueError for others."""
        if not weights or not all(0 < w < math.inf for w in weights):
            raise ValueError(f"weights={list(weights)}: one number above 0 a source, e.g. [2, 1]")
        # The sources of a cycle's samples, in blocks: (1024, BLOCK).
        self.seed, self.counts = seed, _apportion(weights)
        self._sources = _evenly(self.counts).reshape(-1, BLOCK)
        # Samples of each source before each block of a cycle: (1024, sources).
        in_blocks = np.stack([(self._sources == s).sum(1) for s in range(len(weights))], axis=1)
        self._before = np.cumsum(in_blocks, axis=0) - in_blocks
        self._block: tuple[int, np.ndarray] = (-1, self._sources[0])

    def __getitem__(self, n: int) -> tuple[int, int]:
        """Return (source, k): sample n >= 0 is sample k of that source."""
        block, place = divmod(n, BLOCK)
        cycle, row = divmod(block, len(self._sources))
        # The order inside the block, which is kept until another one is asked for.
        if self._block[0] != block:
            # A third number keeps these draws apart from those of clips and passes.
            rng = np.random.default_rng((self.seed, block, 2))
            self._block = (block, rng.permutation(self._sources[row]))
        # Its number within its source: samples of whole cycles, of the blocks before, and of this block.
        sources = self._block[1]
        s = int(sources[place])
        earlier = int((sources[:place] == s).sum())
        return s, cycle * self.counts[s] + int(self._before[row, s]) + earlier


def _apportion(weights: Sequence[float]) -> list[int]:
    """Share out the samples of a cycle among the sources: largest remainders, at least one each."""
    total = math.fsum(weights)
    exact = [w / total * CYCLE for w in weights]
    counts = [max(1, math.floor(x)) for x in exact]
    rest = CYCLE - sum(counts)
    for s in sorted(range(len(counts)), key=lambda s: counts[s] - exact[s])[: max(rest, 0)]:
        counts[s] += 1
    counts[int(np.argmax(counts))] += min(rest, 0)  # what the raised ones took
    return counts


def _evenly(counts: Sequence[int]) -> np.ndarray:
    """Order one cycle (CYCLE,) so that every beginning holds each source's share to within one sample.

    Sample k of a source may come from floor(k * CYCLE / count) on and must have come by ceil((k + 1) * CYCLE / count);
    the earliest end goes first (Baruah et al., Proportionate progress, 1996: for one machine this always works out).
    """
    done = [0] * len(counts)
    begins, ends = [0] * len(counts), [-(-CYCLE // c) for c in counts]
    order = np.empty(CYCLE, np.int16)
    for n in range(CYCLE):
        s = min((ends[i], i) for i in range(len(counts)) if begins[i] <= n)[1]
        order[n] = s
        # When the next sample of this source may come, and must have come.
        done[s] += 1
        begins[s] = done[s] * CYCLE // counts[s]
        ends[s] = -(-(done[s] + 1) * CYCLE // counts[s])
    return order


class _Joined(Sequence):
    """Several sequences, one behind the other, without copying them."""

    def __init__(self, parts: Sequence[Sequence]):
        self.parts, self.ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def place(self, index: int) -> tuple[int, int]:
        """Return (part, index in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index}: there are {len(self)}")
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - (self.ends[part] - len(self.parts[part]))

    def __getitem__(self, index: int) -> Any:
        part, inner = self.place(index)
        return self.parts[part][inner]


class MixedClips:
    """Clips of several sources as one stream, with the interface of VideoClips.

    Training: sample n is sample k of source s, (s, k) = Shares[n]: within a source every pass takes each video once.
    Judging: all videos of the first source in order, then of the next. Unconditional: labels are -1.
    """

    def __init__(
        self,
        parts: dict[str, VideoClips],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        train: bool = True,
    ):
        """Join parts: name -> clips, made with part_seed.

        weights: in the order of parts; None: as many as they have videos.
        """
        if len(parts) < 2:
            raise ValueError(f"a mixture of {list(parts)}: needs two sources or more")
        self.parts, self.names, self.train = list(parts.values()), list(parts), train
        self.seed = seed
        self.weights = list(weights) if weights is not None else [float(len(p)) for p in self.parts]
        if len(self.weights) != len(parts):
            raise ValueError(f"{len(self.weights)} weights for {len(parts)} sources: one each")
        self.shares = Shares(self.weights, seed)
        self.videos = _Joined([part.videos for part in self.parts])
        damaged = [record for part in self.parts for record in part.source.damaged]
        self.source = Source("mixture", "", self.videos, [], damaged)

    @property
    def spec(self) -> ClipSpec:
        """How clips are cut, the same for all parts."""
        return self.parts[0].spec

    @property
    def class_names(self) -> list[str]:
        """[]: classes of different sources are not comparable."""
        return []

    @property
    def short(self) -> Sequence:
        """Videos left out because they are shorter than a clip."""
        return _Joined([part.short for part in self.parts])

    @property
    def failed(self) -> dict[str, str]:
        """Return name -> reason of the videos that could not be read, of this process."""
        failed = {}
        for name, part in zip(self.names, self.parts, strict=True):
            for video, reason in part.failed.items():
                failed[f"{name}/{video}"] = reason
        return failed

    def __len__(self) -> int:
        """Count the usable videos of all parts."""
        return len(self.videos)

    def name(self, video_index: int) -> str:
        """Return a video's path below the root of its source, behind the source's name."""
        part, inner = self.videos.place(video_index)
        return f"{self.names[part]}/{self.parts[part].name(inner)}"

    def label(self, video_index: int) -> int:
        """Return -1: a mixture is unconditional."""
        return -1

    def clip_uint8(self, video_index: int, rng: np.random.Generator) -> np.ndarray:
        """Read a clip of one video: uint8 (T, size, size, 3). Raises BadVideo if it cannot be read."""
        part, inner = self.videos.place(video_index)
        return self.parts[part].clip_uint8(inner, rng)

    def clip_job(self, video_index: int, rng: np.random.Generator) -> tuple:
        """Give `clip_uint8` as a job for data/processes.py: a function and its arguments."""
        part, inner = self.videos.place(video_index)
        return self.parts[part].clip_job(inner, rng)

    def attempts(self, n: int) -> Attempts:
        """Make sample n step by step, as VideoClips; index counts the videos of all parts, part says which source it is of."""
        if n < 0:
            raise IndexError(f"sample {n}: the stream starts at 0")
        # Which source, and which of its samples.
        part, inner = self.shares[int(n)] if self.train else self.videos.place(int(n) % len(self))
        sample = yield from self.parts[part].attempts(inner)
        # Its numbers in the stream of all sources.
        first = self.videos.ends[part] - len(self.parts[part])
        numbers = {"number": int(n), "label": -1, "part": part, "index": int(sample["index"]) + first}
        return sample | {key: torch.tensor(value) for key, value in numbers.items()}

    def __getitem__(self, n: int) -> dict:
        """Sample n, read in this process."""
        return made_here(self.attempts(n))
