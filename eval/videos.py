"""What a folder of videos holds, and the one pixel path of real and generated videos.

A video is a video file, a leaf folder of frames, or an array (T, H, W, 3) or a row of (N, T, H, W, 3) uint8
in an .npy or .npz file. Every clip is decoded by data.video, scaled to cover the target size and cropped at
its centre by the arithmetic of data.clip, and rounded to uint8. An alpha channel is dropped.
"""

import hashlib
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data.clip import ClipSpec, crop_resize_uint8
from data.core.files import sha256_of
from data.core.lazy import lazy
from data.decoder import BadVideo, reading
from data.finding import list_frames, list_videos, natural_key, walk
from data.video import Frames, probe, read_frames

av = lazy("av")

ARRAY_SUFFIXES = (".npy", ".npz")
DEEP_MODES = ("I", "F")  # Pillow's pixels of 16 bits and more; it would clip them at 255
BLOCK_BYTES = 256 << 20  # decoded frames held at once
COMPRESSED_BYTES = 1 << 30  # largest compressed array that is unpacked in memory
# what NumPy and zipfile raise on damaged, encrypted and lying files
_BROKEN = (ValueError, KeyError, OverflowError, RuntimeError, zipfile.BadZipFile)
LOSSLESS_CODECS = ("ffv1", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "png")


@dataclass(frozen=True)
class Video:
    """One video below a folder. key: array inside an .npz; row: index in an (N, T, H, W, 3) array."""

    name: str
    path: Path
    key: str = ""
    row: int = -1

    @property
    def is_array(self) -> bool:
        return self.path.suffix in ARRAY_SUFFIXES


@lru_cache(maxsize=2)
def _unpack(path: Path, key: str, mtime_ns: int) -> np.ndarray:
    """Unpack a compressed array of an .npz file in memory; mtime is part of the cache's key."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _map_member(path: Path, key: str, mtime_ns: int) -> np.ndarray:
    """Open an array of an .npz file: mapped where it was stored as it is (np.savez), else in memory if it is small."""
    # What the array's own header says, and where its values begin behind it.
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
        info = archive.getinfo(f"{key}.npy")
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran_order, dtype = read_header[version](member)
        inside = member.tell()
    # A header that promises more than the archive holds is a lie, or damage.
    size = math.prod(map(int, shape)) * dtype.itemsize
    if dtype.hasobject or 0 in shape or size > info.file_size:
        raise ValueError(f"{dtype} {shape} in {info.file_size} bytes")
    if info.compress_type != zipfile.ZIP_STORED:
        if size > COMPRESSED_BYTES:
            raise ValueError(f"{size >> 20} MiB, compressed; save it with np.savez or as .npy")
        return _unpack(path, key, mtime_ns)
    # The member's local header in the archive: 30 bytes, a name and an extra field, whose lengths are at byte 26.
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(name_length) + int(extra_length) + inside
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


def _load_array(path: Path, key: str, mtime_ns: int) -> np.ndarray:
    """Open an array of a file, mapped where possible, and mapped again each time, so that pages read do not pile up."""
    try:
        with reading(path):
            if not path.is_file():
                raise BadVideo("neither a file nor a folder")
            if path.suffix == ".npz":
                array = _map_member(path, key, mtime_ns)
            else:
                array = np.load(path, "r", allow_pickle=False)
    except _BROKEN as error:
        raise BadVideo(f"{path}: not a readable array file ({error})") from error
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape:
        raise BadVideo(
            f"{path} {key}: {array.dtype} {array.shape}: need uint8 (T, H, W, 3) or (N, T, H, W, 3)"
        )
    return array


def _array(video: Video) -> np.ndarray:
    """Open the frames (T, H, W, 3) of an array video."""
    array = _load_array(video.path, video.key, video.path.stat().st_mtime_ns)
    if (array.ndim == 5) != (video.row >= 0) or video.row >= len(array):
        raise BadVideo(f"{video.path}: changed while it was read")
    return array[video.row] if video.row >= 0 else array


def _array_videos(path: Path, name: str) -> list[Video]:
    """List the videos of one array file; one that cannot be opened stays one video, to be counted as damaged."""
    # An .npz file has arrays by name, an .npy file one without.
    keys = [""]
    try:
        if path.suffix == ".npz":
            with reading(path), np.load(path, allow_pickle=False) as arrays:
                keys = sorted(arrays.files, key=natural_key)
    except _BROKEN:
        return [Video(name, path)]
    # An array (T, H, W, 3) is one video, each row of an (N, T, H, W, 3) is one.
    found = []
    for key in keys:
        label = f"{name}:{key}" if key else name
        try:
            array = _load_array(path, key, path.stat().st_mtime_ns)
        except BadVideo:
            found.append(Video(label, path, key))
            continue
        if array.ndim == 4:
            found.append(Video(label, path, key))
        else:
            found += [Video(f"{label}[{row}]", path, key, row) for row in range(len(array))]
    return found


def find_videos(root: str | Path) -> list[Video]:
    """Find all videos of a folder at any depth (or of one file), in natural order of their names.

    Raises ValueError if there is none.
    """
    root = Path(root)
    if root.is_file():
        return _array_videos(root, root.name) if root.suffix in ARRAY_SUFFIXES else [Video(root.name, root)]
    # Video files and folders of frames, then the array files beside them.
    found = [Video(path.relative_to(root).as_posix(), path) for path in list_videos(root)]
    for below, files in walk(root):
        for name in files:
            if Path(name).suffix in ARRAY_SUFFIXES:
                found += _array_videos(root / below / name, f"{below}{name}")
    if not found:
        raise ValueError(
            f"{root}: no videos here (video files, folders of .png/.jpg frames, .npy or .npz arrays)"
        )
    return sorted(found, key=lambda video: natural_key(video.name))


def shape_of(video: Video) -> tuple[int, int, int]:
    """Look up (frames, height, width). Raises ValueError or OSError if unreadable."""
    if video.is_array:
        return _array(video).shape[:3]
    info = probe(video.path)
    return info.num_frames, info.height, info.width


def read_video(video: Video, indices: np.ndarray | None = None) -> np.ndarray:
    """Read the frames `indices` of a video, default all: uint8 (T, H, W, 3)."""
    if indices is None:
        indices = np.arange(shape_of(video)[0])
    if video.is_array:
        array = _array(video)
        if np.min(indices) < 0 or np.max(indices) >= len(array):
            raise ValueError(
                f"{video.name}: frame {np.max(indices)} asked, it has frames 0..{len(array) - 1}"
            )
        return np.asarray(array[indices])
    if video.path.is_dir():
        refuse_deep_pictures(video.path, indices)
    return np.asarray(read_frames(video.path, indices))


def refuse_deep_pictures(folder: Path, indices: Iterable[int]) -> None:
    """Raise ValueError for grey pictures of more than 8 bits; those of colour lose their low bits, rightly."""
    frames = list_frames(folder)
    for n in sorted(set(map(int, indices))):
        if n >= len(frames):
            return  # the reader says so
        path = frames[n]
        # The head of the file tells the mode; no pixel is decoded.
        try:
            with reading(path), Image.open(path) as picture:
                mode = picture.mode
        except (BadVideo, SyntaxError, Image.DecompressionBombError) as error:
            raise BadVideo(f"{path}: not a readable image ({error})") from error
        if mode.startswith(DEEP_MODES):
            raise BadVideo(f"{path}: {mode} pixels have more than 8 bits; save the frames as 8-bit RGB")


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale to cover height x width (antialiased bilinear), crop the centre: uint8 (T, height, width, 3).

    Frames that have this size already are returned as they are.
    """
    if frames.shape[1:3] == (height, width):
        return np.ascontiguousarray(frames)
    if height == width:
        spec = ClipSpec(len(frames), size=height)  # centre crop: nothing is drawn
        return crop_resize_uint8(frames, spec, np.random.default_rng(0))
    # The largest centred box of the target's aspect ratio, in pixels of the frame.
    _, H, W, _ = frames.shape
    scale = min(H / height, W / width)
    top, left = max((H - scale * height) / 2, 0.0), max((W - scale * width) / 2, 0.0)
    box = (left, top, min(left + scale * width, W), min(top + scale * height, H))
    clip = np.empty((len(frames), height, width, 3), np.uint8)
    for n, frame in enumerate(frames):
        picture = Image.fromarray(np.ascontiguousarray(frame))
        clip[n] = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return clip


def read_clip(
    video: Video, indices: np.ndarray, target: tuple[int, int], source: tuple[int, int], times: bytes = b""
) -> np.ndarray:
    """Read the frames `indices` at the target size (height, width): uint8 (T, height, width, 3).

    source: height and width of the frames. times: the scan's timeline of a file. Large frames do not pile up. Raises
    ValueError if the video cannot be read.
    """
    # Files and folders: each frame is scaled as it is decoded.
    if not video.is_array:
        if video.path.is_dir():
            refuse_deep_pictures(video.path, indices)
        return Frames(video.path, indices, times).map(lambda picture: fit(picture[None], *target)[0])
    # Arrays: some frames at a time.
    H, W = source
    block = max(1, BLOCK_BYTES // (3 * H * W))
    parts = [fit(read_video(video, indices[n : n + block]), *target) for n in range(0, len(indices), block)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@lru_cache(maxsize=65536)
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of(path)


def content_digest(video: Video) -> str:
    """Return the sha256 of what the video is made of: the file's bytes (and the place in an array file), or all frames'."""
    digest = hashlib.sha256()
    for path in list_frames(video.path) if video.path.is_dir() else [video.path]:
        status = path.stat()
        digest.update(_file_sha256(path, status.st_size, status.st_mtime_ns).encode())
    digest.update(f"{video.key} {video.row}".encode())
    return digest.hexdigest()


def storage_of(video: Video) -> str:
    """Tell how the pixels of a file were stored: "lossless" or "lossy". Lossy storage moves every metric."""
    if video.is_array:
        lossless = True
    elif video.path.is_dir():
        lossless = not any(path.suffix.lower() in (".jpg", ".jpeg") for path in video.path.iterdir())
    else:
        with av.open(str(video.path)) as container:
            lossless = container.streams.video[0].codec_context.name in LOSSLESS_CODECS
    return "lossless" if lossless else "lossy"
