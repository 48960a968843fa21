"""Exactly N clips of a folder, chosen before any is judged: seeded, free of damaged videos, counted.

The choice is a pure function of the files' names and content and of the protocol; not of the order on the disk,
the batch size or the number of processes.
"""

import hashlib
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.clip import ClipSpec, frame_indices, span
from data.decoder import BadVideo
from data.finding import IMAGE_SUFFIXES
from data.index import build_index
from data.timeline import SAME_RATE, frames_at_rate
from eval.videos import Video, content_digest, find_videos, refuse_deep_pictures, shape_of, storage_of

logger = logging.getLogger(__name__)
LISTED = 50  # names of short videos in a record; the counts are exact
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Clip:
    """A clip before it is read. source: (height, width) of the stored frames; total: the video's frames.

    times: its timeline (data/timeline.py), b"" for none.
    """

    video: Video
    indices: tuple[int, ...]
    source: tuple[int, int]
    total: int
    times: bytes = b""


class Selection:
    """The seeded, endless order of a folder's usable clips; `take(n)` is its beginning.

    root: a folder or an array file. num_frames, interval: of a clip. sampling, position, clips_per_video, seed: as
    in `eval.protocol.Protocol`. scan_file: where the scan for damage is kept, None for nowhere. workers: processes
    of the scan. fps: clips are cut from what a video shows at that many frames a second, as training does; None: from its
    frames. Raises ValueError as `list_folder`, and for a video of a lower or no known rate than fps when it is met.
    """

    def __init__(
        self,
        root: str | Path,
        num_frames: int,
        interval: int = 1,
        sampling: str = "videos",
        position: str = "random",
        clips_per_video: int = 1,
        seed: int = 0,
        scan_file: Path | None = None,
        workers: int = 1,
        fps: float | None = None,
    ):
        self.root, self.seed, self.sampling = Path(root), seed, sampling
        self.clips_per_video, self.scan_file, self.workers = clips_per_video, scan_file, max(1, workers)
        self.spec, self.fps = ClipSpec(num_frames, interval, position=position), fps
        self.listing = list_folder(root)
        # What the scan found so far, by the videos' names.
        self.damaged: dict[str, str] = {}
        self.short: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, int, int]] = {}
        self._times: dict[str, bytes] = {}
        self._shown: dict[str, np.ndarray] = {}  # frame numbers at self.fps
        # The beginning of the order that was asked for, and what comes after it.
        self._clips: list[Clip] = []
        self._wanted = 0
        self._stream = self._windows() if sampling == "clips" else self._videos()

    def take(self, num: int) -> list[Clip]:
        """Return the first `num` clips, exactly. Raises ValueError with the counts and the way out if there are fewer."""
        self._wanted = num
        while len(self._clips) < num:
            clip = next(self._stream, None)
            if clip is None:
                raise ValueError(self._too_few(num))
            self._clips.append(clip)
        return self._clips[:num]

    def reject(self, video: Video, reason: str) -> None:
        """Leave a video out that passed the scan and could not be read; other clips take its clips' places."""
        self._leave_out(video, reason)
        self._clips = [clip for clip in self._clips if clip.video != video]

    def first_shape(self) -> tuple[int, int]:
        """Return (height, width) of the first usable video in natural order: the size at which samples are judged."""
        for video in self.listing.videos:
            self._screen([video])
            if video.name in self._shapes:
                return self._shapes[video.name][1:]
        raise ValueError(f"{self.root}: none of {len(self.listing.videos)} videos can be read")

    def _leave_out(self, video: Video, reason: str) -> None:
        self.damaged[video.name] = reason = " ".join(reason.split())
        self._shapes.pop(video.name, None)
        logger.warning("left out, damaged: %s (%s)", video.name, reason)

    def _screen(self, videos: list[Video]) -> None:
        """Find frames and size of videos, or what is wrong with them. Files are decoded whole, arrays opened."""
        new = [v for v in videos if v.name not in self._shapes and v.name not in self.damaged]
        # Files and folders of frames, by the scan that training uses.
        if files := {str(v.path): v for v in new if not v.is_array}:
            self._scan(files)
        # Array files.
        for video in new:
            if video.is_array:
                if self.fps:
                    raise ValueError(self._no_rate(video.name, "an array file has no rate"))
                try:
                    self._shapes[video.name] = shape_of(video)
                except BadVideo as error:
                    self._leave_out(video, str(error))
        # Of what can be read, what is shorter than a clip.
        for video in new:
            if video.name in self._shapes and self._shapes[video.name][0] < span(self.spec):
                self.short[video.name] = self._shapes[video.name][0]

    def _scan(self, files: dict[str, Video]) -> None:
        """Note the shape and timeline of each file that can be decoded to its end, and leave the others out."""
        index = build_index(list(files), self.scan_file, self.workers)
        for record in index.good:
            video = files[record.path]
            try:
                if video.path.is_dir():
                    refuse_deep_pictures(video.path, range(record.num_frames))
                count = record.num_frames
                if self.fps:
                    if record.fps < SAME_RATE * self.fps:
                        raise ValueError(self._no_rate(video.name, f"it has {record.fps:g} frames a second"))
                    shown = frames_at_rate(record.times, self.fps, record.fps, 0, count)
                    self._shown[video.name], count = shown, len(shown)
                self._shapes[video.name] = (count, record.height, record.width)
                self._times[video.name] = record.times
            except BadVideo as error:
                self._leave_out(video, str(error))
        for record in index.damaged:
            self._leave_out(files[record.path], record.damaged)

    def _no_rate(self, name: str, why: str) -> str:
        return f"{self.root}: {name} cannot be shown at {self.fps:g} frames a second: {why}; leave it out, or take a lower --real-fps"

    def _usable(self, video: Video) -> bool:
        return video.name in self._shapes and video.name not in self.short

    def _in_seeded_order(self) -> Iterator[Video]:
        """Yield the usable videos in the seeded order, screened some at a time."""
        videos = self.listing.videos
        order = [videos[n] for n in np.random.default_rng(self.seed).permutation(len(videos))]
        start = 0
        while start < len(order):
            # As many as clips are still wanted: with none damaged or short, all that has to be decoded.
            part = order[start : start + max(self._wanted - len(self._clips), 16)]
            self._screen(part)
            yield from filter(self._usable, part)
            start += len(part)

    def _starts(self, video: Video, count: int) -> list[int]:
        """Draw the starts of up to `count` different clips of a video from (seed, the video's name)."""
        total = self._shapes[video.name][0]
        rng = np.random.default_rng((self.seed, zlib.crc32(video.name.encode())))
        if count == 1:
            return [int(frame_indices(total, self.spec, rng)[0])]
        windows = total - span(self.spec) + 1
        return rng.permutation(windows)[:count].tolist()

    def _clip(self, video: Video, start: int) -> Clip:
        total, *source = self._shapes[video.name]
        indices = start + np.arange(self.spec.num_frames) * self.spec.interval
        if self.fps:
            indices = self._shown[video.name][indices]
        return Clip(video, tuple(indices.tolist()), tuple(source), total, self._times.get(video.name, b""))

    def _videos(self) -> Iterator[Clip]:
        """Yield a clip of each video, then a second one of each, up to clips_per_video."""
        usable = []
        for video in self._in_seeded_order():
            usable.append(video)
            yield self._clip(video, self._starts(video, self.clips_per_video)[0])
        # Further turns through the same videos; one that was rejected meanwhile is passed over.
        for turn in range(1, self.clips_per_video):
            for video in usable:
                starts = self._starts(video, self.clips_per_video) if self._usable(video) else []
                if turn < len(starts):
                    yield self._clip(video, starts[turn])

    def _windows(self) -> Iterator[Clip]:
        """Yield all windows of all videos in a seeded order without repetition: long videos weigh more."""
        self._screen(self.listing.videos)
        # Number the windows through: those of usable[k] end before ends[k].
        usable = [video for video in self.listing.videos if self._usable(video)]
        counts = [self._shapes[video.name][0] - span(self.spec) + 1 for video in usable]
        ends = np.cumsum(counts, dtype=np.int64)
        # Draw numbers, and find the video and the start of each.
        for window in np.random.default_rng(self.seed).permutation(int(ends[-1]) if len(ends) else 0):
            place = int(np.searchsorted(ends, window, side="right"))
            if self._usable(usable[place]):
                yield self._clip(usable[place], int(window - (ends[place] - counts[place])))

    def _too_few(self, num: int) -> str:
        """Say how many clips there are and how to get more, as far as the settings leave a way."""
        have, usable = len(self._clips), sum(map(self._usable, self.listing.videos))
        ways = [f"--num-videos {have}"] if have > 1 else ["fewer frames or a smaller interval"]
        if self.sampling == "videos" and usable and self.spec.position == "random":
            ways.append(f"--clips-per-video {max(-(-num // usable), self.clips_per_video + 1)}")
        stale = f", {len(self.listing.stale)} not in the manifest" if self.listing.stale else ""
        return (
            f"{self.root}: {have} clips, {num} needed ({len(self.listing.videos)} videos found, "
            f"{len(self.short)} shorter than {span(self.spec)} frames, {len(self.damaged)} damaged{stale}); "
            f"{' or '.join(ways)}"
        )

    def summary(self, clips: list[Clip]) -> dict:
        """Summarise counts, sizes, storage and digests of the clips that were judged, for the record."""
        # Each clip counts in the digest, each video once in the counts of sizes and lengths.
        lines = [f"{clip.video.name}\t{content_digest(clip.video)}\t{clip.indices[0]}" for clip in clips]
        used = {clip.video: clip for clip in clips}
        storage = set(map(storage_of, used))
        sizes = Counter(f"{clip.source[0]}x{clip.source[1]}" for clip in used.values())
        lengths = Counter(clip.total for clip in used.values())
        return {
            "root": self.root.resolve().name,
            "clips": len(clips),
            "videos": len(used),
            "found": len(self.listing.videos),
            "examined": len(self._shapes) + len(self.damaged),
            "short": len(self.short),
            "short_names": list(self.short)[:LISTED],
            "damaged": len(self.damaged),
            "damaged_reasons": dict(self.damaged),
            "ignored_files": self.listing.ignored,
            "stale": len(self.listing.stale),
            "stale_names": self.listing.stale[:LISTED],
            "manifest": self.listing.manifest,
            "sizes": dict(sizes.most_common()),
            "frames": {str(frames): videos for frames, videos in sorted(lengths.items())},
            "files_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            "storage": storage.pop() if len(storage) == 1 else "mixed",
        }


# ---- the videos of a folder, and the manifest of generated ones -----------------------------------------


@dataclass(frozen=True)
class Listing:
    """The videos of a folder.

    stale: in the folder and not in its manifest, left out. manifest: for the record. ignored: number of files that
    are not part of a video (another suffix, a picture beside videos).
    """

    videos: list[Video]
    stale: list[str]
    manifest: dict | None
    ignored: int


def _count_ignored(root: Path, videos: list[Video]) -> int:
    """Count the files below root that no video is made of; hidden ones and the manifest do not count."""
    paths = {str(video.path) for video in videos}
    ignored = 0
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            is_video = os.path.join(folder, name) in paths
            is_frame = folder in paths and name.lower().endswith(IMAGE_SUFFIXES)
            is_manifest = Path(folder) == root and name == MANIFEST
            ignored += not (name.startswith(".") or is_video or is_frame or is_manifest)
    return ignored


def _names(path: Path, content: object) -> set[str]:
    """Read the file names of a manifest. Raises ValueError if it is none, or says that it is not complete."""
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{path}: no list `files` in it; generate the samples again or delete it")
    if content.get("num_videos", len(files)) != len(files) or len(set(files)) != len(files):
        raise ValueError(
            f"{path}: num_videos={content.get('num_videos')} but {len(set(files))} different files"
        )
    if content.get("complete", True) is not True:
        raise ValueError(f"{path}: the samples are not complete; run pipelines.sample again to finish them")
    return set(files)


def list_folder(root: str | Path) -> Listing:
    """List all videos of a folder; where it has a manifest.json, exactly those listed there.

    Raises ValueError if there is no video, if a listed file is missing, or if the samples are not complete.
    """
    root, videos = Path(root), find_videos(root)
    path = root / MANIFEST
    if not path.is_file():
        return Listing(videos, [], None, _count_ignored(root, videos))
    # Every file that the manifest names must be there.
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    names = _names(path, content)
    missing = names - {video.path.relative_to(root).as_posix() for video in videos}
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(names)} files are missing, e.g. {min(missing)}; "
            "run pipelines.sample again to make them"
        )
    # Others, left over from an earlier run, are left out and named.
    listed, stale = [], []
    for video in videos:
        if video.path.relative_to(root).as_posix() in names:
            listed.append(video)
        else:
            stale.append(video.name)
    if stale:
        logger.warning(
            "%s: %d videos are not in the manifest and left out, e.g. %s", root, len(stale), stale[0]
        )
    digest = hashlib.sha256(raw).hexdigest()
    manifest = {"sha256": digest, "settings": content.get("settings")}
    return Listing(listed, stale, manifest, _count_ignored(root, videos))
