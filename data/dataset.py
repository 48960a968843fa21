"""One dataset for every source: an endless, seeded stream of clips that can be entered at any sample."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from data.clip import ClipSpec, crop_resize_uint8, frame_indices, span
from data.core.lazy import lazy
from data.decoder import BadVideo
from data.demo import DemoVideos
from data.sources import Source, video_frames
from data.table import Video, VideoTable
from data.timeline import SAME_RATE, frames_at_rate

torch = lazy("torch")

logger = logging.getLogger(__name__)


Attempts = Generator[tuple, Any, dict]


def clip_indices(video: Video, spec: ClipSpec, rng: np.random.Generator) -> np.ndarray:
    """Choose the frames of a clip: `frame_indices` of the video, or of what it shows at spec.fps frames per second."""
    record = video.record
    if not spec.fps:
        return frame_indices(record.num_frames, spec, rng)
    shown = frames_at_rate(record.times, spec.fps, record.fps, video.first, record.num_frames)
    try:
        return shown[frame_indices(len(shown), spec, rng)]
    except ValueError as error:  # its frames come less evenly than its mean rate says
        raise BadVideo(f"{record.path}: at fps={spec.fps:g} {error}") from error


def read_clip(
    video: Video, spec: ClipSpec, rng: np.random.Generator, demo: DemoVideos | None = None
) -> np.ndarray:
    """Read a clip of one video: uint8 (T, size, size, 3), resized as it is decoded. Raises BadVideo if it cannot be read."""
    indices = clip_indices(video, spec, rng)
    frames = video_frames(video, indices, spec.size, demo)
    try:
        return crop_resize_uint8(frames, spec, rng)
    except BadVideo:
        raise
    except ValueError as error:  # too small for the clip
        raise BadVideo(f"{video.record.path}: {error}") from error


def made_here(attempts: Attempts) -> dict:
    """Make the sample of `attempts` in this process."""
    answer = None
    while True:
        try:
            function, *args = attempts.send(answer)
        except StopIteration as end:
            return end.value
        try:
            answer = function(*args)
        except BadVideo as error:
            answer = error


class ClipStream:
    """What clips of one source and of several have in common: samples by number, and single clips of a video.

    `videos` are the usable ones; `clip_job` and `attempts` are a subclass's.
    """

    videos: Sequence

    def __len__(self) -> int:
        """Count the usable videos, that is samples of one pass; the stream itself does not end."""
        return len(self.videos)

    def clip_uint8(self, video_index: int, rng: np.random.Generator) -> np.ndarray:
        """Read a clip of one video: uint8 (T, size, size, 3). Raises BadVideo if it cannot be read."""
        function, *args = self.clip_job(video_index, rng)
        return function(*args)

    def __getitem__(self, n: int) -> dict:
        """Make sample n in this process."""
        return made_here(self.attempts(n))


def list_digest(clips: Any) -> str:
    """sha256 over name and class of each video of a VideoClips or a mixture, in their order: what video number n is."""
    lines = "\n".join(f"{clips.name(i)} {clips.label(i)}" for i in range(len(clips)))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


class VideoClips(ClipStream):
    """Clips of a source as a pure function of (seed, n): resuming at sample n needs no state.

    `clips[n]`, any n >= 0, is sample n of an endless stream. Pass n // len(clips) goes through the videos in an
    order drawn from (seed, pass) when train is set, else in order; start frame, crop and mirroring are drawn from
    (seed, n). Each sample is a dict: video uint8 (T, size, size, 3), for `data.clip.to_float`; number int64, n itself;
    label int64, -1 when unconditional; index int64, which video; failed int64, how many videos were passed over because
    they could not be read any more; passed_over, a JSON object {source/name: reason} of these, "" when there are none.
    """

    def __init__(self, source: Source, spec: ClipSpec, seed: int = 0, train: bool = True):
        """Open the stream; videos shorter than a clip are left out under short="skip" and listed in `short`."""
        self.source, self.spec, self.seed, self.train = source, spec, seed, train
        # Videos that are long enough for a clip, and those that are not.
        least = span(spec) if spec.short == "skip" else 1
        lengths = self._lengths()
        self.videos: VideoTable = source.videos.select(lengths >= least)
        self.short: VideoTable = source.videos.select(lengths < least)
        self.failed: dict[str, str] = {}  # name -> reason, of this process
        if len(self.short):
            logger.info("%s: %d videos are shorter than %d frames", source.name, len(self.short), least)
        if not len(self.videos):
            longest = max(lengths, default=0)
            raise ValueError(
                f"{source.name}: no usable video ({len(source.videos) + len(source.damaged)} found, "
                f"{len(source.damaged)} damaged, {len(self.short)} shorter than {least} frames, the longest "
                f"{longest}{f', at fps={spec.fps:g}' if spec.fps else ''}); use fewer frames, a smaller interval, or short=stretch|reflect|loop"
            )
        self._order = (-1, np.arange(0))

    def _lengths(self) -> np.ndarray:
        """Count frames of each video, at spec.fps if that is set; ValueError for videos of a lower rate without spec.repeat."""
        videos, fps = self.source.videos, self.spec.fps
        lengths = videos.column("num_frames")
        if not fps:
            return lengths
        # Refuse those whose frames would have to be repeated, unless that is asked for, and those without a rate.
        rates = videos.column("fps")
        slow = np.flatnonzero(rates <= 0 if self.spec.repeat else rates < SAME_RATE * fps)
        if len(slow):
            known = f"{rates[slow[0]]:g} frames a second" if rates[slow[0]] > 0 else "no known rate"
            way_out = "leave these out" if self.spec.repeat else "a lower fps, or repeat=true repeats frames"
            raise ValueError(
                f"clip.fps={fps:g}: {len(slow)} of {len(videos)} videos of {self.source.name} are slower, e.g. "
                f"{videos.name(int(slow[0]))}: {known}; {way_out}"
            )
        taken = np.where((rates >= SAME_RATE * fps) & (rates < fps), rates, fps)
        return ((lengths - 1) / rates * taken + 1e-6).astype(np.int64) + 1

    def keep_first(self, count: int) -> None:
        """Leave out all usable videos but the first N."""
        self.videos = self.videos.select(np.arange(len(self.videos)) < count)

    @property
    def class_names(self) -> list[str]:
        """Names of the labels; [] when unconditional."""
        return self.source.class_names

    def name(self, video_index: int) -> str:
        """Return a video's path below the root of its source."""
        return self.videos.name(video_index)

    def label(self, video_index: int) -> int:
        """Return a video's class, -1 when unconditional."""
        return self.videos.label(video_index)

    def clip_job(self, video_index: int, rng: np.random.Generator) -> tuple:
        """Give `clip_uint8` as a job for data/processes.py: a function and its arguments."""
        return read_clip, self.videos[video_index], self.spec, rng, self.source.demo

    def attempts(self, n: int) -> Attempts:
        """Make sample n step by step: yield jobs (a function and its arguments), be sent the clip or a BadVideo, until one is good."""
        if n < 0:
            raise IndexError(f"sample {n}: the stream starts at 0")
        # Which pass and which place in it: n alone decides.
        epoch, place = divmod(int(n), len(self))
        order, passed_over = self._pass(epoch), {}
        # A video that cannot be read is passed over for the next of the same pass.
        for failed in range(len(self)):
            video_index = int(order[(place + failed) % len(self)])
            rng = np.random.default_rng((self.seed, int(n)))
            clip = yield self.clip_job(video_index, rng)
            if isinstance(clip, BadVideo):
                self._report(video_index, clip)
                passed_over[f"{self.source.name}/{self.name(video_index)}"] = str(clip)
                continue
            sample = {"video": torch.from_numpy(clip), "number": torch.tensor(n)}
            sample["label"], sample["index"] = (
                torch.tensor(self.label(video_index)),
                torch.tensor(video_index),
            )
            sample["failed"] = torch.tensor(failed)
            return sample | {"passed_over": json.dumps(passed_over) if passed_over else ""}
        raise ValueError(
            f"{self.source.name}: none of the {len(self)} videos can be read; the last: {self.name(video_index)}: "
            f"{self.failed[self.name(video_index)]}"
        )

    def _pass(self, epoch: int) -> np.ndarray:
        """Return the order of the videos in a pass, which is kept until another pass is asked for."""
        if not self.train:
            return np.arange(len(self))
        if self._order[0] != epoch:
            # A third number keeps this stream of draws apart from those of the samples.
            self._order = (epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(len(self)))
        return self._order[1]

    def _report(self, video_index: int, error: Exception) -> None:
        name = self.name(video_index)
        if name not in self.failed:
            logger.warning("cannot be read, the next video takes its place: %s: %s", name, error)
        self.failed[name] = str(error)
