"""Reading is frame-exact whatever the file, writing is atomic, listing is complete."""

import av
import numpy as np
import pytest
from PIL import Image

from data.encode import encode_webp, write_ffv1, write_mp4, writing_video
from data.finding import list_videos, natural_key
from data.video import probe, read_frames

# name, codec, pixel format, options; B-frames and open groups are where readers that seek go wrong.
FILES = {
    "mpeg4.avi": ("mpeg4", "yuv420p", {"g": 12, "bf": 0}),
    "mpeg4_b_frames.avi": ("mpeg4", "yuv420p", {"g": 12, "bf": 2}),
    "h264.mp4": ("libx264", "yuv420p", {}),
    "h264_no_b_frames.mp4": ("libx264", "yuv420p", {"g": 12, "bf": 0}),
    "h264_open_groups.mkv": ("libx264", "yuv420p", {"g": 12, "x264-params": "open-gop=1"}),
    "h264_10_bits.mp4": ("libx264", "yuv420p10le", {"bf": 0}),
    "hevc.mp4": ("libx265", "yuv420p", {"g": 12, "x265-params": "log-level=0"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"g": 12, "deadline": "realtime", "cpu-used": 8}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "animated.gif": ("gif", "rgb8", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_any_frames_in_any_order_equal_those_of_a_whole_decode(tmp_path, scene, encode, name):
    codec, pixel_format, options = FILES[name]
    path = encode(tmp_path / name, scene, codec, pixel_format, **options)
    with av.open(str(path)) as container:
        whole = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert len(whole) == 100
    rng = np.random.default_rng(0)
    picks = [list(range(60, 85)), list(range(7, 90, 3)), [0, 50, 99], [99], [70, 3, 70], [37]]
    picks += [rng.choice(100, 3, replace=False).tolist() for _ in range(6)]
    for indices in picks:
        difference = np.abs(read_frames(path, indices).astype(int) - whole[indices])
        assert difference.max() <= 1, (
            indices
        )  # neighbouring frames of the scene differ by 100 levels and more


def test_another_reader_sees_the_same_frames_of_intact_real_clips(assets):
    decord = pytest.importorskip("decord")
    decord.logging.set_level(decord.logging.QUIET)
    rng, compared = np.random.default_rng(0), 0
    for path in [*list_videos(assets / "ucf101"), assets / "web/flipping_a_pancake.mkv"]:
        with av.open(str(path)) as container:
            if container.streams.video[0].codec_context.has_b_frames:
                continue  # where decord 0.6 is wrong
        indices = [*rng.integers(0, 60, 4).tolist(), 59, 0]  # past the first group of pictures
        frames = decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
        assert np.abs(frames.astype(int) - read_frames(path, indices)).max() <= 1, path.name
        compared += 1
    assert compared >= 11  # UCF101 without ApplyEyeMakeup, whose clips have B-frames


def test_rotation_of_the_file_is_applied(assets):
    for name, quarters in (("0", 0), ("90", -1), ("180", 2), ("270", 1)):
        path = assets / f"corrupt/odd/video_{name}.mov"
        info = probe(path)
        assert (info.width, info.height) == ((320, 568) if quarters % 2 else (568, 320))
        with av.open(str(path)) as container:
            stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert stored.shape == (320, 568, 3)
        assert np.array_equal(read_frames(path, [0])[0], np.rot90(stored, quarters))


def test_ffv1_gives_the_same_bits_back_at_any_size(tmp_path, scene):
    for height, width in ((64, 64), (63, 41)):
        frames = scene[:5, :height, :width]
        write_ffv1(tmp_path / "x.mkv", frames, 8)
        assert np.array_equal(read_frames(tmp_path / "x.mkv", range(5)), frames)
    assert probe(tmp_path / "x.mkv").fps == 8


def test_mp4_pads_an_odd_size_and_keeps_rate_and_length(tmp_path, scene):
    write_mp4(tmp_path / "x.mp4", scene[:9, :63, :41], 29.97)
    info = probe(tmp_path / "x.mp4")
    assert (info.num_frames, info.height, info.width) == (9, 64, 42)
    assert info.fps == pytest.approx(29.97, abs=1e-3)
    assert (
        np.abs(read_frames(tmp_path / "x.mp4", [4])[0, :63, :41].astype(int) - scene[4, :63, :41]).mean() < 4
    )


@pytest.mark.parametrize(
    ("height", "width", "tag"), [(720, 1280, 1), (576, 1024, 2), (64, 1280, 1), (578, 64, 1)]
)
def test_the_colours_of_an_mp4_are_those_that_players_take_its_size_for(tmp_path, height, width, tag):
    """BT.709, and tagged so, for HD; else BT.601, as a file without tags is taken for."""
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 60, 40)], np.uint8)
    picture = np.broadcast_to(np.repeat(colours, width // 4, axis=0), (height, width, 3))
    path = tmp_path / "x.mp4"
    with writing_video(path, height, width, 8) as add:
        add(picture[None])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        assert frame.colorspace == tag
        assert stream.codec_context.color_primaries == tag
        # the matrix itself, by the formula: Y = 16 + 219 (kr R + kg G + kb B)
        kr, kb = (0.2126, 0.0722) if tag == 1 else (0.299, 0.114)
        luma = frame.to_ndarray()[:height:8, width // 8 : width : width // 4].mean(axis=0)[:4]
        expected = 16 + 219 / 255 * (colours @ np.array([kr, 1 - kr - kb, kb]))
        np.testing.assert_allclose(luma, expected, atol=2)
    seen = read_frames(path, [0])[0][height // 2, width // 8 :: width // 4].astype(int)
    assert np.abs(seen - colours).max() <= 6


def test_webp_is_an_animation_of_all_frames(scene, tmp_path):
    (tmp_path / "x.webp").write_bytes(encode_webp(scene[:6], 10))
    with Image.open(tmp_path / "x.webp") as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (6, (64, 64), 0)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, scene, monkeypatch):
    write_ffv1(tmp_path / "x.mkv", scene[:3], 8)
    before = (tmp_path / "x.mkv").read_bytes()
    with pytest.raises(ValueError, match="need uint8"):
        write_ffv1(tmp_path / "x.mkv", scene[:3].astype(np.float32), 8)
    with pytest.raises((OSError, ValueError)):
        write_mp4(tmp_path / "x.mkv" / "y.mp4", scene[:3], 8)  # a file is not a folder

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.encode.os.replace", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_ffv1(tmp_path / "x.mkv", scene[:9], 8)
    assert [path.name for path in tmp_path.iterdir()] == ["x.mkv"]
    assert (tmp_path / "x.mkv").read_bytes() == before


def _images(folder, frames, name="{:d}.png", first=1):
    folder.mkdir(parents=True)
    for n, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(n + first))
    return folder


def test_a_folder_of_frames_reads_like_a_video_in_natural_order(tmp_path, scene):
    folder = _images(tmp_path / "clip", scene[:12], "f_{:d}.png")  # f_2 before f_10
    (folder / "Thumbs.db").write_bytes(b"junk")
    assert np.array_equal(read_frames(folder, [11, 0, 1]), scene[[11, 0, 1]])
    info = probe(folder)
    assert (info.num_frames, info.fps, info.width, info.height) == (12, 0.0, 64, 64)


def test_indices_outside_the_video_are_a_clear_error(tmp_path, scene, encode):
    avi = encode(tmp_path / "a.avi", scene[:9], "mpeg4", bf=0)
    b_frames = encode(tmp_path / "b.avi", scene[:9], "mpeg4", bf=2)
    folder = _images(tmp_path / "c", scene[:9])
    for path in (avi, b_frames, folder):
        with pytest.raises(ValueError, match=r"frame 9 asked.*0\.\.8"):
            read_frames(path, [3, 9])
        with pytest.raises(ValueError, match="none below 0"):
            read_frames(path, [-1])


def test_unreadable_files_are_one_line_that_names_them(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.avi").touch()
    (tmp_path / "folder").mkdir()
    for name in ("text.mp4", "empty.avi", "folder", "absent.avi"):
        for call in (probe, lambda path: read_frames(path, [0])):
            with pytest.raises(ValueError, match=name):
                call(tmp_path / name)


def test_listing_finds_files_and_frame_folders_and_no_junk(tmp_path, scene, encode):
    encode(tmp_path / "b" / "clip_10.avi", scene[:2], "mpeg4")
    encode(tmp_path / "b" / "clip_2.AVI".lower(), scene[:2], "mpeg4")
    (tmp_path / "b" / "poster.jpg").write_bytes(b"x")  # beside videos: not a folder of frames
    _images(tmp_path / "a" / "v_1" / "v_1_3", scene[:2])
    (tmp_path / "a" / "v_1" / "v_1_3" / "extra").mkdir()  # an empty sub-folder does not hide the frames
    _images(tmp_path / ".hidden", scene[:2])
    (tmp_path / "notes.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    names = [path.relative_to(tmp_path).as_posix() for path in list_videos(tmp_path)]
    assert names == ["a/v_1/v_1_3", "b/clip_2.avi", "b/clip_10.avi"]
    with pytest.raises(ValueError, match="no such folder"):
        list_videos(tmp_path / "absent")


def test_natural_key_orders_numbers_by_value():
    assert sorted(["x10", "x9", "X1", "x", "9", "y2z10", "y2z9"], key=natural_key) == [
        "9", "x", "X1", "x9", "x10", "y2z9", "y2z10"
    ]  # fmt: skip
