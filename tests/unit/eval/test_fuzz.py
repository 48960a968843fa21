"""Two hundred damaged and odd files among good ones: counted by name, nothing raised, no wrong pixel judged."""

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data.encode import write_ffv1, write_mp4
from data.video import read_frames
from eval.extraction import RunOptions, judge_folder
from eval.features import Extractor
from eval.selection import Selection
from eval.weights import Provenance

T, SIDE = 12, 32


def video(seed: int, frames=T, height=SIDE, width=SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_pictures(folder, pictures) -> None:
    folder.mkdir()
    for n, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{n}.png")


def write_variable_rate(path, frames) -> None:
    """Frames at uneven times: a reader that fills the gaps would repeat some."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for n, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")
            frame.pts = n * n * 7 + n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_damaged(root, rng: np.random.Generator) -> int:
    """Files and folders that hold no whole video, each named bad_*; returns how many."""
    sources = {}
    write_ffv1(root / "source.mkv", video(900, 40), 8)
    write_mp4(root / "source.mp4", video(901, 40), 8)
    for suffix in ("mkv", "mp4"):
        sources[suffix] = (root / f"source.{suffix}").read_bytes()
        (root / f"source.{suffix}").unlink()
    sources["npy"] = array_bytes(video(902))
    buffer = io.BytesIO()
    np.savez(buffer, a=video(903))
    sources["npz"] = buffer.getvalue()
    count = 0

    def put(suffix: str, content: bytes) -> None:
        nonlocal count
        (root / f"bad_{count}.{suffix}").write_bytes(content)
        count += 1

    for suffix, content in sources.items():
        for share in rng.uniform(0.02, 0.9, 28):  # truncated
            put(suffix, content[: int(len(content) * share)])
        for _ in range(4):
            put(suffix, b"")
            put(suffix, bytes(5000))
            put(suffix, rng.bytes(5000))
            put(suffix, b"<html>moved permanently</html>")
    picture = io.BytesIO()
    Image.fromarray(video(904)[0]).save(picture, "png")
    for suffix in ("mp4", "avi", "mkv", "webm"):  # wrong extensions
        put(suffix, picture.getvalue())
        put(suffix, sources["npy"])
    for array in (
        np.zeros((0, 8, 8, 3), np.uint8), video(1) / 255.0, video(1).astype(np.uint16), video(1)[..., :1],
        np.concatenate([video(1), video(1)[..., :1]], axis=-1), np.zeros((0,), np.uint8),
    ):  # fmt: skip
        put("npy", array_bytes(array))
    for n in range(12):
        grey = video(n)[..., 0].astype(np.uint16) * 257
        write_pictures(root / f"bad_{count}", grey if n % 3 == 0 else video(n))
        if n % 3 == 1:
            (root / f"bad_{count}" / "5.png").unlink()  # a gap
        if n % 3 == 2:
            (root / f"bad_{count}" / "5.png").write_bytes(b"\x89PNG")
        count += 1
    return count


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """(folder, {name: pixels of what is whole}, number of damaged ones)."""
    root, rng = tmp_path_factory.mktemp("zoo"), np.random.default_rng(0)
    bad = write_damaged(root, rng)
    whole = {f"good_{n}.mkv": video(n) for n in range(3)}
    whole |= {"odd.mkv": video(5, height=33, width=47), "rate.mkv": video(6)}
    for name, frames in whole.items():
        (write_variable_rate if name == "rate.mkv" else lambda p, f: write_ffv1(p, f, 8))(root / name, frames)
    opaque = np.concatenate([video(7), np.full((T, SIDE, SIDE, 1), 90, np.uint8)], axis=-1)
    write_pictures(root / "alpha", opaque)
    np.save(root / "short.npy", video(8, 5))
    whole["alpha"] = video(7)
    return root, whole, bad


def test_two_hundred_bad_files_are_counted_by_name_and_none_is_judged(zoo):
    root, whole, bad = zoo
    assert bad >= 200

    class First(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :64]

    extractor = Extractor(
        First(),
        lambda clip: clip.permute(3, 0, 1, 2).float(),
        Provenance("", "", "", False, 0),
        torch.device("cpu"),
    )
    selection = Selection(root, T)
    judged = judge_folder(selection, len(whole), (SIDE, SIDE), extractor, RunOptions(workers=0))
    with pytest.raises(
        ValueError, match=f"{len(whole)} clips, 500 needed .*1 shorter than 12 frames, {bad} damaged"
    ):
        selection.take(500)
    used = {clip.video.name for clip in selection.take(len(whole))}
    assert used == set(whole)
    summary = selection.summary(selection.take(len(whole)))
    assert summary["found"] == bad + len(whole) + 1
    assert summary["damaged"] == bad
    assert all(reason and "\n" not in reason for reason in summary["damaged_reasons"].values())
    assert np.isfinite(judged.features).all()


def test_what_is_whole_keeps_its_exact_frames(zoo):
    root, whole, _ = zoo
    for name, frames in whole.items():
        np.testing.assert_array_equal(read_frames(root / name, range(T)), frames)


@pytest.mark.assets
def test_damaged_clips_from_the_wild_are_counted(assets):
    selection = Selection(assets / "corrupt" / "derived", 9)
    with pytest.raises(ValueError, match="damaged"):
        selection.take(1000)
    assert {name for name in selection.damaged if name.startswith(("zero_length", "text_as", "png_as"))} == {
        "zero_length.avi", "text_as.avi", "png_as.mp4"
    }  # fmt: skip
