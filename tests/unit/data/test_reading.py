"""A clip is what a player shows: any container and codec, trimmed, mirrored or with odd time stamps, however long or large."""

import logging
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data import by_decord, scan
from data import video as video_module
from data.clip import ClipSpec, crop_resize_uint8
from data.decoder import BadVideo
from data.finding import VIDEO_SUFFIXES, video_names
from data.scan import scan_file
from data.sources import open_source, video_frames
from data.timeline import unpack_times
from data.video import Frames, probe, read_frames

COUNT = 150
BASE = Fraction(1, 25)


def picture(n: int) -> np.ndarray:
    """Eight bars that carry n, dark or bright, before a little texture."""
    bits = np.array([40 + 170 * (n >> bit & 1) for bit in range(8)], np.uint8).repeat(12)
    rows = np.arange(64, dtype=np.uint8)[:, None] % 16
    return np.repeat((bits[None] + rows)[..., None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    columns = frame.astype(float).mean(axis=(0, 2)).reshape(8, -1).mean(1)
    return int(sum(1 << bit for bit in range(8) if columns[bit] > 125))


def write(path, codec="libx264", pixel_format="yuv420p", count=COUNT, ticks=None, base=BASE, **options):
    """A video whose frame n shows n, at ticks[n] * base (default: 25 a second)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixel_format
        stream.codec_context.time_base = base
        for n in range(count):
            frame = av.VideoFrame.from_ndarray(picture(n), format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = ticks[n] if ticks else n, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source, target, seconds):
    """The packets of `source` with other time stamps; in mp4 an edit list hides what comes before 0."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        old = before.streams.video[0]
        new = after.add_stream_from_template(old)
        shift = int(Fraction(seconds) / old.time_base)
        for packet in before.demux(old):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, new
                after.mux(packet)
    return target


def shown(path) -> np.ndarray:
    """All frames, decoded in order."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_exact(path, whole=None):
    """Clips of every kind are those of sequential decoding, with and without the scan's timeline."""
    whole = shown(path) if whole is None else whole
    record = scan_file(path)
    assert record.damaged == ""
    assert record.num_frames == len(whole)
    rng, last = np.random.default_rng(0), len(whole) - 1
    picks = [range(0, last, 3), range(max(0, last - 24), last + 1), [last, 0, last // 2, last]]
    picks += [range(start, min(start + 9, last + 1)) for start in rng.integers(0, last, 6).tolist()]
    for times in (record.times, b""):
        for indices in picks:
            assert np.array_equal(read_frames(path, indices, times), whole[list(indices)]), (indices, times)
    return record


H264 = {"g": 24, "x264-params": "scenecut=0"}
KINDS = {  # name: codec, pixel format, options
    "closed.mp4": ("libx264", "yuv420p", H264 | {"bf": 3}),
    "no_b.mp4": ("libx264", "yuv420p", H264 | {"bf": 0}),
    "open.mkv": ("libx264", "yuv420p", {"g": 24, "bf": 3, "x264-params": "open-gop=1:scenecut=0"}),
    "intra_refresh.mkv": ("libx264", "yuv420p", {"g": 24, "bf": 0, "x264-params": "intra-refresh=1"}),
    "h264.ts": ("libx264", "yuv420p", H264 | {"bf": 2}),
    "h264.flv": ("libx264", "yuv420p", H264 | {"bf": 2}),
    "h264.avi": ("libx264", "yuv420p", H264 | {"bf": 2}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=0:keyint=24:open-gop=1"}),
    "vp8_alt_ref.webm": ("libvpx", "yuv420p", {"g": 24, "auto-alt-ref": 1, "lag-in-frames": 16, "b": "1M"}),
    "vp9_alt_ref.webm": (
        "libvpx-vp9",
        "yuv420p",
        {"g": 24, "auto-alt-ref": 1, "lag-in-frames": 16, "cpu-used": 8},
    ),
    "mpeg4_b.avi": ("mpeg4", "yuv420p", {"g": 12, "bf": 2}),
    "mpeg4_b.mp4": ("mpeg4", "yuv420p", {"g": 12, "bf": 2}),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {"g": 12, "bf": 2}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"g": 12, "bf": 2}),
    "mpeg1.mpg": ("mpeg1video", "yuv420p", {"g": 12, "bf": 2}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "flv1.flv": ("flv", "yuv420p", {"g": 12}),
    "wmv2.asf": ("wmv2", "yuv420p", {"g": 12}),
    "ffv1_long_groups.mkv": ("ffv1", "yuv420p", {"g": 30}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "animated.gif": ("gif", "rgb8", {}),
    "huffyuv.avi": ("huffyuv", "yuv422p", {}),
    "cinepak.mov": ("cinepak", "rgb24", {"g": 12}),
    "theora.ogv": ("libtheora", "yuv420p", {"g": 12}),
    "av1.mkv": ("libsvtav1", "yuv420p", {"g": 24, "preset": 12, "svtav1-params": "lookahead=20"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_clip_is_what_decoding_in_order_gives_for_every_codec_and_container(tmp_path, name):
    codec, pixel_format, options = KINDS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg here has no {codec}")
    count = 60 if codec in ("cinepak", "libsvtav1") else COUNT
    assert_exact(write(tmp_path / name, codec, pixel_format, count, **options))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9"])
@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("hidden", [1, 12, 30, 75])
def test_a_trimmed_file_is_intact_and_shows_what_its_edit_list_leaves(tmp_path, codec, b_frames, hidden):
    if codec == "libvpx-vp9" and b_frames:
        pytest.skip("VP9 has no B-frames")
    options = {"bf": b_frames} if codec != "libvpx-vp9" else {"lag-in-frames": 0, "cpu-used": 8}
    whole = write(tmp_path / "whole.mp4", codec, g=24, **options)
    cut = remux(whole, tmp_path / "cut.mp4", -hidden * BASE)
    numbers = [number_of(frame) for frame in shown(cut)]
    assert hidden <= numbers[0] + 3
    assert numbers == list(range(numbers[0], COUNT))
    record = assert_exact(cut)
    assert probe(cut).num_frames == record.num_frames == len(numbers)
    clip = [number_of(frame) for frame in read_frames(cut, range(0, len(numbers), 3), record.times)]
    assert all(before < after for before, after in zip(clip, clip[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "seconds"), [("clock.mkv", 1_700_000_000), ("clock.webm", 2_200_000), ("late.ts", 90_000)]
)
def test_a_recording_with_the_time_of_day_in_its_stamps_reads_like_any_other(tmp_path, name, seconds):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    # without B-frames: Matroska gives the first of them no decoding time, and the copy would lose them
    options = {"cpu-used": 8, "g": 24} if name.endswith("webm") else H264 | {"bf": 0}
    plain = write(tmp_path / f"plain.{name.split('.')[1]}", codec, **options)
    assert_exact(remux(plain, tmp_path / name, seconds))


def test_a_variable_rate_with_gaps_is_read_to_the_frame(tmp_path):
    ticks = np.cumsum(np.random.default_rng(0).integers(1, 4000, COUNT)).tolist()
    assert_exact(write(tmp_path / "v.mkv", ticks=ticks, base=Fraction(1, 1000), bf=2, g=24))


def test_times_that_run_back_are_read_in_the_order_a_player_shows(tmp_path):
    parts = [write(tmp_path / f"{n}.ts", g=24, count=40).read_bytes() for n in range(2)]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    record = assert_exact(tmp_path / "joined.ts")
    assert record.times == b""  # read from its beginning


@pytest.fixture
def begun(monkeypatch):
    """Files that were decoded from their first frame."""
    asked, slow = [], video_module._from_the_beginning
    monkeypatch.setattr(
        video_module, "_from_the_beginning", lambda *given: asked.append(given) or slow(*given)
    )
    return asked


def test_a_clip_of_a_video_with_b_frames_is_entered_near_its_first_frame(tmp_path, begun):
    path = write(tmp_path / "v.mp4", **H264, bf=3)
    times = scan_file(path).times
    assert list(unpack_times(times).entries) == [24, 48, 72, 96, 120, 144]
    for known in (times, b""):
        assert [number_of(f) for f in read_frames(path, range(130, 140), known)] == list(range(130, 140))
    assert not begun


def test_a_file_that_changed_after_its_scan_is_read_from_its_beginning(tmp_path, begun):
    path = write(tmp_path / "v.mp4", bf=3, g=24)
    times = scan_file(path).times
    write(path, ticks=[2 * n for n in range(COUNT)], bf=3, g=24)
    assert [number_of(f) for f in read_frames(path, [100, 101], times)] == [100, 101]
    assert len(begun) == 1


def test_an_entry_that_shows_other_frames_is_not_used(tmp_path):
    # each picture of a gif is drawn over the one before
    path = write(tmp_path / "x.gif", "gif", "rgb8")
    assert list(unpack_times(scan_file(path).times).entries) == []


def test_mirrored_and_turned_pictures_are_shown_as_players_show_them(tmp_path):
    plain = write(tmp_path / "plain.mp4", count=4)
    stored = shown(plain)[0]
    one = 1 << 16
    turns = {
        (one, 0, 0, one): stored,
        (-one, 0, 0, one): stored[:, ::-1],
        (one, 0, 0, -one): stored[::-1],
        (-one, 0, 0, -one): stored[::-1, ::-1],
        (0, one, -one, 0): np.rot90(stored, -1),
        (0, -one, one, 0): np.rot90(stored, 1),
        (0, one, one, 0): stored.swapaxes(0, 1),
        (0, -one, -one, 0): stored[::-1, ::-1].swapaxes(0, 1),
    }
    identity = np.array([one, 0, 0, 0, one, 0, 0, 0, 1 << 30], ">i4").tobytes()
    content = plain.read_bytes()
    place = content.rindex(identity)  # the track's; the film's comes first
    for (a, b, c, d), expected in turns.items():
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
        path = tmp_path / "turned.mp4"
        path.write_bytes(content[:place] + matrix + content[place + 36 :])
        assert np.array_equal(read_frames(path, [0])[0], expected), (a, b, c, d)
        info, record = probe(path), scan_file(path)
        assert (info.height, info.width) == (record.height, record.width) == expected.shape[:2]


@pytest.mark.parametrize(
    ("ratio", "size"), [("4/3", (128, 64)), ("1/2", (96, 128)), ("1/1", (96, 64)), ("0/1", (96, 64))]
)
def test_pixels_that_are_not_square_are_made_so(tmp_path, ratio, size):
    path = (
        write(tmp_path / "v.mkv", count=30, aspect=Fraction(ratio))
        if ratio != "0/1"
        else write(tmp_path / "v.mkv", count=30)
    )
    record, info = scan_file(path), probe(path)
    assert (record.width, record.height) == (info.width, info.height) == size
    frames = read_frames(path, [3, 29, 3])
    assert frames.shape == (3, size[1], size[0], 3)
    assert [number_of(frame) for frame in frames] == [3, 29, 3]


LARGE = """
import sys, numpy as np
from data.clip import ClipSpec
from data.dataset import read_clip
from data.table import Video
from data.scan import ScanRecord
from data.timeline import pack_times
count, decord = int(sys.argv[3]), sys.argv[2] == "decord"
times = pack_times(range(count), 1, 25)
record = ScanRecord(sys.argv[1], count, 3840, 2160, times=times, decord=decord)
clip = read_clip(Video("v", record), ClipSpec(count, 1, 256, flip=True), np.random.default_rng(0))
assert clip.shape == (count, 256, 256, 3)
print(next(int(row.split()[1]) >> 10 for row in open("/proc/self/status") if row.startswith("VmHWM")))
"""


@pytest.mark.parametrize(("reader", "count"), [("pyav", 81), ("decord", 16)])
def test_a_clip_of_a_4k_video_takes_a_loader_less_than_600_mib(tmp_path, reader, count):
    pytest.importorskip(reader.removeprefix("py"))
    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "40"})
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((2160, 3840, 3), np.uint8), format="rgb24").reformat(
            format="yuv420p"
        )
        for n in range(count):
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if reader == "decord":
        assert by_decord.agrees(str(path))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(by_decord, "_MOST", 15 * 3 * 3840 * 2160)  # less than there are
            assert not by_decord.agrees(str(path))
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(path), reader, str(count)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 600


def test_many_large_frames_are_not_held_at_once_and_crop_as_if_they_were(tmp_path, monkeypatch):
    path = write(tmp_path / "v.mp4", count=30)
    whole = read_frames(path, range(30))
    monkeypatch.setattr(video_module, "_AT_ONCE", 1 << 18)
    lazy = read_frames(path, [5, 3, 3, *range(10, 30)])
    assert isinstance(lazy, Frames)
    assert np.array_equal(lazy, whole[[5, 3, 3, *range(10, 30)]])
    spec = ClipSpec(23, size=32, crop="random", flip=True)
    for seed in range(4):
        clips = [crop_resize_uint8(f, spec, np.random.default_rng(seed)) for f in (lazy, np.asarray(lazy))]
        assert np.array_equal(*clips)


@pytest.mark.parametrize("number", [24, 23, 12])  # EMFILE, ENFILE, ENOMEM
def test_a_machine_that_lacks_something_is_no_fault_of_the_file(tmp_path, monkeypatch, number):
    path = write(tmp_path / "v.mp4", count=4)

    def lacking(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(av, "open", lacking)
    for call in (scan_file, probe, lambda p: read_frames(p, [0])):
        with pytest.raises(OSError, match="not a fault of the file") as caught:
            call(path)
        assert not isinstance(caught.value, ValueError)


def test_a_file_that_cannot_be_opened_now_is_no_damage_that_is_kept(tmp_path):
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("link.mp4", "loop.mp4", "absent.mp4"):
        record = scan_file(tmp_path / name)
        assert record.damaged
        assert not record.final
        with pytest.raises(BadVideo, match=name):
            read_frames(tmp_path / name, [0])
    assert scan_file(tmp_path / "pipe.mp4").damaged == "neither a file nor a folder"


def test_listing_passes_over_what_is_no_file_and_survives_links_and_any_bytes(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    names = [b"a.mp4", b"line\nbreak.mp4", b"tab\t.mp4", b"latin-\xe9.mp4", "ü.mp4".encode(), b"cr\r.mp4"]
    for name in names:
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "up").symlink_to(tmp_path, target_is_directory=True)
    for hidden in ("._a.mp4", ".DS_Store"):
        (tmp_path / hidden).write_bytes(b"x")
    (tmp_path / "frames").mkdir()
    Image.fromarray(picture(0)).save(tmp_path / "frames" / "1.png")
    (tmp_path / "frames" / "2.png").symlink_to(tmp_path / "gone.png")
    found = video_names(tmp_path)
    assert sorted(found) == sorted([*map(os.fsdecode, names), "frames"])
    assert caplog.text.count("pipe.mp4: neither a file nor a folder") == 1
    assert "2.png" in scan_file(tmp_path / "frames").damaged


def trimmed(folder, hidden=12):
    return remux(write(folder / "whole.mp4", g=24, bf=0), folder / "trimmed.mp4", -hidden * BASE)


def test_decord_reads_only_files_on_which_every_frame_agreed(tmp_path, monkeypatch, caplog):
    pytest.importorskip("decord")
    root = tmp_path / "videos"
    root.mkdir()
    for name, (codec, pixel_format, options) in KINDS.items():
        if codec in av.codecs_available and Path(name).suffix in VIDEO_SUFFIXES:
            count = 60 if codec in ("cinepak", "libsvtav1") else COUNT
            write(root / name, codec, pixel_format, count, **options)
    trimmed(root)
    remux(root / "whole.mp4", root / "clock.mkv", 1_700_000_000)  # decord ends the process
    source = open_source("folder", root, index_dir=tmp_path / "index", reader="decord")
    readers = {video.name: video.record.decord for video in source.videos}
    assert len(readers) >= 19
    assert readers["whole.mp4"]
    assert not readers["trimmed.mp4"]
    assert not readers["clock.mkv"]
    rng, asked, opened = np.random.default_rng(0), set(), by_decord.pictures
    monkeypatch.setattr(by_decord, "pictures", lambda path, *a: asked.add(path.name) or opened(path, *a))
    for video in source.videos:
        whole, last = shown(video.record.path), video.record.num_frames - 1
        picks = [range(0, last, 3), range(max(0, last - 24), last + 1)]
        for indices in picks + [range(n, min(n + 9, last + 1)) for n in rng.integers(0, last, 6).tolist()]:
            assert np.array_equal(np.asarray(video_frames(video, indices, 64)), whole[list(indices)]), (
                video.name
            )
    assert asked == {name for name, decord in readers.items() if decord}

    caplog.set_level(logging.INFO)
    open_source("folder", root, index_dir=tmp_path / "index", reader="decord")  # nothing is compared again
    assert "comparing" not in caplog.text
    assert not any(v.record.decord for v in open_source("folder", root, index_dir=tmp_path / "index").videos)
    (root / "trimmed.mp4").replace(root / "whole.mp4")
    source = open_source("folder", root, index_dir=tmp_path / "index", reader="decord")
    assert "comparing decord with PyAV on 1 of" in caplog.text  # the file that changed
    assert not {video.name: video.record.decord for video in source.videos}["whole.mp4"]
    monkeypatch.setitem(sys.modules, "decord", None)
    source = open_source("folder", root, index_dir=tmp_path / "index", reader="decord")
    assert not any(video.record.decord for video in source.videos)
    assert "decord cannot be imported" in caplog.text
    with pytest.raises(ValueError, match="choose pyav or decord"):
        open_source("folder", root, reader="Decord")


def test_frames_come_from_decord_where_it_agreed_and_from_pyav_where_it_then_fails(tmp_path, monkeypatch):
    decord = pytest.importorskip("decord")
    path = write(tmp_path / "v.mp4", g=24, bf=0)
    times, opened, asked = scan_file(path).times, decord.VideoReader, []
    monkeypatch.setattr(decord, "VideoReader", lambda *a, **k: asked.append(a) or opened(*a, **k))
    monkeypatch.setattr(video_module, "_enter", None)
    frames = Frames(path, [100, 40, 100], times, decord=True)
    assert [number_of(frame) for frame in np.asarray(frames)] == [100, 40, 100]
    assert len(asked) == 1
    monkeypatch.undo()

    class Reader:
        length = COUNT

        def __init__(self, *_, **__):
            self.reader = opened(str(path), num_threads=1)

        def __len__(self):
            return self.length

        def __getitem__(self, n):
            if n > 50 and self.length == COUNT:
                raise decord.DECORDError("torn")
            return self.reader[n if self.length == COUNT else 0]

    monkeypatch.setattr(decord, "VideoReader", Reader)
    for length in (COUNT, COUNT - 1):  # fails on the way; is another file than the one compared
        Reader.length = length
        assert [number_of(frame) for frame in np.asarray(frames)] == [100, 40, 100]


def test_an_entry_after_which_one_frame_differs_is_not_used(tmp_path):
    path = write(tmp_path / "v.mp4", bf=3, g=24)
    with av.open(str(path)) as container:
        seen = [(f.pts, scan._digest(f), f.key_frame) for f in container.decode(video=0)]
    ticks, digests, is_key = map(list, zip(*seen, strict=True))
    keys = [n for n, key in enumerate(is_key) if key]
    whole = scan._entries(path, ticks, digests, keys)
    assert len(whole) > 3
    other = whole[1] + 3
    digests[other] ^= 1  # decoding from frame 0 showed something else there
    left = scan._entries(path, ticks, digests, keys)
    assert whole[1] not in left
    assert [n for n in left if n > other] == whole[2:]
