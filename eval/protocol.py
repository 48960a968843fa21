"""What FVD, KVD and IS depend on besides the videos: named protocols, as data, written into every record.

A name is a protocol, or a protocol and a score: `tats`, `stylegan-v/fvd2048_16f`, `omnilatte/fvd2048_16f_step3`
(2,048 videos of each side, 16 frames, every third frame of the real videos).
"""

import math
import re
from dataclasses import asdict, dataclass, fields, replace

from data.core.option import option

MIN_FRAMES, MAX_FRAMES = 9, 256  # of I3D: ceil(T / 8) >= 2 time positions for the last pooling
CHOICES = {
    "resize": ("squash", "short"),
    "position": ("random", "center", "start"),
    "sampling": ("videos", "clips"),
    "ddof": (0, 1),
}
SCORE = re.compile(r"(?:fvd|kvd)(\d+)_(\d+)f(?:_step(\d+))?(?:_fakestep(\d+))?(?:_(\d+(?:\.\d+)?)fps)?")


class _Knobs:
    """What both kinds of protocol share: checks, and what differs from the protocol of that name."""

    def check(self, at_least: dict[str, int]) -> None:
        """Raise ValueError for a count below its least value or an invalid choice."""
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        # A knob that one of the two kinds lacks counts as its first choice.
        for name, choices in CHOICES.items():
            value = getattr(self, name, choices[0])
            if value not in choices:
                raise ValueError(f"{name}={value!r}: one of {', '.join(map(str, choices))}")
        if self.clips_per_video > 1 and (self.sampling, self.position) != ("videos", "random"):
            raise ValueError(
                f"clips_per_video={self.clips_per_video}: needs sampling=videos and position=random, else the "
                "clips of one video would be equal"
            )
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size={self.size}: height and width in pixels, e.g. 256x256")

    def overrides(self) -> dict:
        """Return the settings that differ from the protocol of this name; N, frames, size and seed are exempt."""
        free = (
            "num_videos",
            "num_frames",
            "real_interval",
            "fake_interval",
            "real_fps",
            "interval",
            "size",
            "seed",
        )
        base, changed = self.table()[self.name], {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in free and value != getattr(base, field.name):
                changed[field.name] = value
        return changed

    def title(self) -> str:
        """Return the protocol's name, with the knobs that were changed: `tats with eps=0.001`."""
        changed = ", ".join(f"{name}={value}" for name, value in self.overrides().items())
        return f"{self.name} with {changed}" if changed else self.name

    def as_dict(self) -> dict:
        return {**asdict(self), "overrides": self.overrides()}


@dataclass(frozen=True)
class Protocol(_Knobs):
    """The knobs of FVD and KVD. Defaults: `omnilatte`.

    I3D sees ceil(T / 8) - 1 windows of time (16 frames: 1, 81: 10) and the logits are their mean. size: (height, width)
    to which both sides are scaled and centre-cropped before the network's own resize to 224 pixels, which is "squash" or
    "short" side and centre crop. sampling: "videos" draws each video with equal chance, "clips" each window of the set,
    so that long videos weigh more (TATS). ddof: 1 divides covariances by N - 1, 0 by N.
    """

    name: str = "omnilatte"
    num_videos: int = option(2048, "clips of each side, exactly (default 2048)")
    num_frames: int = option(16, "9 to 256 (default 16)")
    real_interval: int = option(1, "frame step in real videos: the training's (1)")
    fake_interval: int = option(1, "frame step in generated videos (1)")
    real_fps: float | None = option(
        None, "of real videos, frames a second: the training's clip.fps (default: each frame)"
    )
    size: tuple[int, int] | None = option(None, "of both, 256 or 144x176 (default: the generated videos')")
    sampling: str = option("videos", "each video once, or all windows")
    position: str = option("random", "of a clip in a longer video")
    clips_per_video: int = option(1, "at most this many different clips of one video")
    resize: str = option("squash", "how I3D gets 224 pixels")
    eps: float = option(1e-5, "batch norm of I3D: 1e-5 TATS, 1e-3 TF-Hub")
    ddof: int = option(1, "covariances over N - ddof")
    seed: int = option(0, "of the choice of videos and clips (default 0)")

    def __post_init__(self):
        if self.num_videos < 2:
            raise ValueError(
                f"num_videos={self.num_videos}: a distance between sets needs at least 2, e.g. 2048"
            )
        if not MIN_FRAMES <= self.num_frames <= MAX_FRAMES:
            raise ValueError(
                f"num_frames={self.num_frames}: I3D takes {MIN_FRAMES} to {MAX_FRAMES} frames, e.g. 16"
            )
        if self.real_fps is not None and not 0 < self.real_fps < math.inf:
            raise ValueError(f"real_fps={self.real_fps}: frames a second, above 0, e.g. 8")
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps}: above 0; 1e-5 as TATS, 1e-3 as TF-Hub")
        self.check({"real_interval": 1, "fake_interval": 1, "clips_per_video": 1, "seed": 0})

    @staticmethod
    def table() -> dict:
        return PROTOCOLS

    def label(self, metric: str) -> str:
        """Name the score, with the knobs that change a number most: fvd2048_16f, fvd2048_16f_step3."""
        steps = f"_step{self.real_interval}" if self.real_interval > 1 else ""
        steps += f"_fakestep{self.fake_interval}" if self.fake_interval > 1 else ""
        rate = f"_{self.real_fps:g}fps" if self.real_fps else ""
        return f"{metric}{self.num_videos}_{self.num_frames}f{steps}{rate}"


@dataclass(frozen=True)
class InceptionProtocol(_Knobs):
    """The knobs of IS. Defaults: `tgan2`. C3D takes exactly 16 frames.

    splits: parts of the set that are scored apart, mean and deviation over them. shuffle_seed: legacy numpy seed of a
    shuffle before the split; None keeps the order of the videos' names. The other knobs as in `Protocol`.
    """

    name: str = "tgan2"
    num_videos: int = option(2048, "exactly this many (default 2048)")
    splits: int = option(1, "1 as TGAN2, 10 as StyleGAN-V")
    shuffle_seed: int | None = option(None, "shuffle before splitting (StyleGAN-V: 42)")
    interval: int = option(1, "distance of the 16 frames in the file (1)")
    size: tuple[int, int] | None = option(None, "before C3D's resize (default: the videos' own)")
    sampling: str = option("videos", "each video once, or all windows")
    position: str = option("start", "default start: the first 16 frames")
    clips_per_video: int = option(1, "at most this many different clips of one video")
    seed: int = option(0, "of the choice of videos and clips (default 0)")

    def __post_init__(self):
        self.check({"num_videos": 1, "splits": 1, "interval": 1, "clips_per_video": 1, "seed": 0})
        if self.splits > self.num_videos:
            raise ValueError(f"splits={self.splits}: at most the number of videos, {self.num_videos}")

    @staticmethod
    def table() -> dict:
        return INCEPTION_PROTOCOLS

    @property
    def num_frames(self) -> int:
        return 16

    def label(self, metric: str = "is") -> str:
        step = f"_step{self.interval}" if self.interval > 1 else ""
        return f"{metric}{self.num_videos}_16f{step}_splits{self.splits}"


PROTOCOLS = {
    # One clip of each video, since long videos should not weigh more; the rest as TATS, whose KVD has the
    # magnitude the paper reports.
    "omnilatte": Protocol(),
    "tats": Protocol("tats", sampling="clips"),
    "stylegan-v": Protocol("stylegan-v", eps=1e-3, ddof=0),
    "videogpt": Protocol("videogpt", resize="short"),
}
INCEPTION_PROTOCOLS = {
    "tgan2": InceptionProtocol(),
    "stylegan-v": InceptionProtocol("stylegan-v", splits=10, shuffle_seed=42),
}


def named_protocol(text: str, **knobs) -> Protocol:
    """Find `tats` or `tats/fvd2048_16f_step3`, with single knobs changed; knobs that are None stay the protocol's.

    Raises ValueError for a name that is not in PROTOCOLS and for a score that is not of that form.
    """
    name, _, score = text.partition("/")
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r}: one of {', '.join(PROTOCOLS)}")
    chosen = {}
    # What the score's name says: clips, frames and steps.
    if score:
        match = SCORE.fullmatch(score)
        if not match:
            raise ValueError(f"score {score!r}: written like fvd2048_16f or fvd2048_16f_step3")
        names = ("num_videos", "num_frames", "real_interval", "fake_interval", "real_fps")
        for knob, value in zip(names, match.groups(), strict=True):
            if value:
                chosen[knob] = float(value) if knob == "real_fps" else int(value)
    # Single knobs override it.
    chosen |= {knob: value for knob, value in knobs.items() if value is not None}
    return replace(PROTOCOLS[name], **chosen)


def parse_size(text: str) -> tuple[int, int]:
    """Read a size in pixels: `256` is a square, `144x176` height x width. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise ValueError(f"size {text!r}: pixels, as 256 or 144x176 (height x width)")
    return int(match.group(1)), int(match.group(2) or match.group(1))
