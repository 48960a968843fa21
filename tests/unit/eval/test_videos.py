"""Folders of videos: every kind is found, read through one pixel path, counted exactly."""

import numpy as np
import pytest
from PIL import Image

from data.clip import ClipSpec, crop_resize_uint8
from data.encode import write_ffv1
from eval.videos import (
    _load_array,
    content_digest,
    find_videos,
    fit,
    read_clip,
    read_video,
    shape_of,
    storage_of,
)


def frames(seed: int, T=9, H=16, W=16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (T, H, W, 3), dtype=np.uint8)


def write_frames(folder, video) -> None:
    folder.mkdir(parents=True)
    for n, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"{n}.png")


@pytest.fixture
def mixed(tmp_path):
    """The same kind of video stored in five ways, at several depths."""
    write_ffv1(tmp_path / "a" / "0.mkv", frames(0), fps=8)
    write_frames(tmp_path / "b" / "deep" / "clip", frames(1, T=12))
    np.save(tmp_path / "c.npy", frames(2))
    np.save(tmp_path / "d.npy", np.stack([frames(3), frames(4)]))
    np.savez(tmp_path / "e.npz", x=frames(5), y=np.stack([frames(6)]))
    return tmp_path


def test_every_kind_of_storage_gives_its_exact_pixels_back(mixed):
    found = find_videos(mixed)
    names = [video.name for video in found]
    assert names == ["a/0.mkv", "b/deep/clip", "c.npy", "d.npy[0]", "d.npy[1]", "e.npz:x", "e.npz:y[0]"]
    for seed, video in enumerate(found):
        T = 12 if seed == 1 else 9
        assert shape_of(video) == (T, 16, 16)
        np.testing.assert_array_equal(read_video(video), frames(seed, T=T))
        assert storage_of(video) == "lossless"


def test_frame_twelve_comes_after_frame_nine(mixed):
    video = find_videos(mixed)[1]
    np.testing.assert_array_equal(read_video(video, np.array([9, 11])), frames(1, T=12)[[9, 11]])


def test_lossy_storage_is_named(tmp_path):
    (tmp_path / "v").mkdir()
    for n, frame in enumerate(frames(0)):
        Image.fromarray(frame).save(tmp_path / "v" / f"{n}.jpg")
    assert storage_of(find_videos(tmp_path)[0]) == "lossy"


def test_pixels_of_the_right_size_are_not_touched_and_squares_go_the_trainers_way():
    video = frames(0, H=20, W=30)
    np.testing.assert_array_equal(fit(video, 20, 30), video)
    expected = crop_resize_uint8(video, ClipSpec(9, size=16), np.random.default_rng(0))
    np.testing.assert_array_equal(fit(video, 16, 16), expected)


def test_a_rectangle_is_covered_without_distortion_and_cropped_at_its_centre():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, None, :, None] * 6, (9, 40, 40, 3))
    wide = fit(ramp, 10, 20)  # half the size: every row the same, columns kept in full
    assert wide.shape == (9, 10, 20, 3)
    assert np.abs(wide[0, :, 1:-1, 0] - (np.arange(1, 19) * 12 + 3.0)).max() <= 1
    tall = fit(ramp, 20, 10)  # the middle half of the columns
    assert np.abs(tall[0, :, :, 0] - (np.arange(10) * 12 + 63.0)).max() <= 1
    middle = fit(ramp.swapaxes(1, 2), 10, 20)  # the middle half of the rows
    assert np.abs(middle[0, :, :, 0] - (np.arange(10) * 12 + 63.0)[:, None]).max() <= 1


def test_large_frames_are_read_in_blocks_with_the_same_pixels(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", frames(0, T=11))
    (video,) = find_videos(tmp_path)
    whole = read_clip(video, np.arange(11), (8, 8), (16, 16))
    monkeypatch.setattr("eval.videos.BLOCK_BYTES", 2 * 3 * 16 * 16)
    np.testing.assert_array_equal(read_clip(video, np.arange(11), (8, 8), (16, 16)), whole)


def test_a_large_npz_is_mapped_and_a_compressed_one_is_read_or_refused(tmp_path, monkeypatch):
    rows = np.stack([frames(n) for n in range(3)])
    np.savez(tmp_path / "a.npz", x=np.zeros(3), videos=rows)
    np.savez_compressed(tmp_path / "b.npz", videos=rows)
    np.savez(tmp_path / "c.npz", videos=np.asfortranarray(rows))
    for n, name in enumerate(("a", "b", "c")):
        found = [v for v in find_videos(tmp_path) if v.name.startswith(f"{name}.npz:videos")]
        np.testing.assert_array_equal(read_video(found[1]), rows[1])
        array = _load_array(found[1].path, "videos", n)
        assert isinstance(array, np.memmap) == (name != "b")
    monkeypatch.setattr("eval.videos.COMPRESSED_BYTES", 10)
    with pytest.raises(ValueError, match=r"compressed; save it with np\.savez or as \.npy"):
        _load_array(tmp_path / "b.npz", "videos", -1)


def test_grey_pictures_of_16_bits_are_refused_and_not_clipped(tmp_path):
    (tmp_path / "v").mkdir()
    for n in range(9):
        Image.fromarray(frames(n)[0, :, :, 0].astype(np.uint16) * 257).save(tmp_path / "v" / f"{n}.png")
    with pytest.raises(ValueError, match=r"more than 8 bits; save the frames as 8-bit RGB"):
        read_video(find_videos(tmp_path)[0], np.arange(9))


def test_frames_outside_an_array_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", frames(0))
    for index in (-1, 9):
        with pytest.raises(ValueError, match=r"frames 0\.\.8"):
            read_video(find_videos(tmp_path)[0], np.array([index]))


def test_an_empty_folder_and_a_missing_one_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no videos here"):
        find_videos(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_videos(tmp_path / "nowhere")


def test_video_ten_comes_after_video_two(tmp_path):
    for n in (10, 2, 1):
        np.save(tmp_path / f"{n}.npy", frames(n))
    assert [video.name for video in find_videos(tmp_path)] == ["1.npy", "2.npy", "10.npy"]


def test_arrays_are_found_where_videos_are_and_not_in_hidden_folders(mixed, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    np.save(elsewhere / "linked.npy", frames(7))
    (mixed / "z").symlink_to(elsewhere)
    (mixed / ".hidden").mkdir()
    np.save(mixed / ".hidden" / "old.npy", frames(8))
    assert [video.name for video in find_videos(mixed)][-1] == "z/linked.npy"
    assert len(find_videos(mixed)) == 8


def test_rows_and_arrays_of_one_file_have_digests_of_their_own(mixed):
    digests = [content_digest(video) for video in find_videos(mixed)]
    assert len(set(digests)) == len(digests) == 7
