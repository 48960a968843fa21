"""clip.fps: frames by their time stamps, from sources of several rates."""

from fractions import Fraction

import av
import numpy as np
import pytest

from data.clip import ClipSpec
from data.dataset import VideoClips, clip_indices
from data.encode import write_ffv1
from data.scan import ScanRecord
from data.sources import open_source
from data.table import Video
from data.timeline import pack_times


def indices(spec, times=b"", fps=30.0, count=90, first=0):
    record = ScanRecord("v", count, 16, 16, fps, times=times)
    return clip_indices(Video("v", record, first=first), spec, np.random.default_rng(0)).tolist()


def test_the_frame_is_the_last_whose_time_has_come():
    spec = ClipSpec(5, position="start", fps=8)
    assert indices(spec, fps=24.0) == [0, 3, 6, 9, 12]
    assert indices(spec, fps=30.0) == [
        0,
        3,
        7,
        11,
        15,
    ]  # at 0.125 s frame 3 is shown, frame 4 from 0.133 s on
    assert indices(spec, fps=8.0) == [0, 1, 2, 3, 4]
    assert indices(ClipSpec(5, position="start", fps=8, repeat=True), fps=5.0) == [0, 0, 1, 1, 2]


def test_an_uneven_video_is_read_by_its_own_times():
    ticks = [0, 100, 110, 120, 260, 390, 510, 900]  # ms
    times = pack_times(ticks, 1, 1000)
    assert indices(ClipSpec(5, position="start", fps=8), times, count=8) == [0, 3, 3, 4, 5]
    assert indices(ClipSpec(3, position="start", fps=8), times, count=5, first=3) == [0, 0, 1]
    at = np.asarray(ticks)[indices(ClipSpec(8, position="start", fps=8), times, count=8)]
    assert all(t <= 125 * k for k, t in enumerate(at))


@pytest.mark.parametrize("fps", [24, 30, 60, 24000 / 1001, 30000 / 1001])
def test_a_clock_of_milliseconds_gives_each_frame_once_at_the_source_s_own_rate(fps):
    times = pack_times([round(1000 * n / fps) for n in range(200)], 1, 1000)
    spec = ClipSpec(150, position="start", fps=round(fps))
    assert indices(spec, times, fps=fps, count=200) == list(range(150))
    assert indices(ClipSpec(9, position="start", fps=fps / 3), times, fps=fps, count=200) == list(
        range(0, 27, 3)
    )


@pytest.fixture
def source(tmp_path):
    for name, rate, count in (("a", 24, 60), ("b", 30, 75), ("c", 8, 20)):
        frames = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
        write_ffv1(tmp_path / "data" / f"{name}.mkv", frames, rate)
    return open_source("folder", tmp_path / "data", index_dir=tmp_path / "index", workers=1, val_fraction=0)


def test_clips_of_mixed_sources_have_one_rate(source):
    clips = VideoClips(source, ClipSpec(9, size=16, fps=8, position="start"), train=False)
    assert [clips.name(i) for i in range(3)] == ["a.mkv", "b.mkv", "c.mkv"]
    shown = [clips[i]["video"][:, 0, 0, 0].tolist() for i in range(3)]
    assert shown[0] == [3 * k for k in range(9)]
    assert shown[1] == [30 * k // 8 for k in range(9)]
    assert shown[2] == list(range(9))


def test_length_is_counted_at_that_rate(source):
    clips = VideoClips(source, ClipSpec(20, size=16, fps=8), train=False)
    assert (len(clips), len(clips.short)) == (3, 0)
    with pytest.raises(ValueError, match=r"3 shorter than 21 frames, the longest 20, at fps=8"):
        VideoClips(source, ClipSpec(21, size=16, fps=8))


def test_a_rate_above_the_source_is_refused_unless_frames_may_repeat(source):
    with pytest.raises(
        ValueError, match=r"clip.fps=12: 1 of 3 videos .* c.mkv: 8 frames a second; .*repeat=true"
    ):
        VideoClips(source, ClipSpec(9, size=16, fps=12))
    clips = VideoClips(source, ClipSpec(9, size=16, fps=12, repeat=True, position="start"), train=False)
    assert clips[2]["video"][:, 0, 0, 0].tolist() == [8 * k // 12 for k in range(9)]


def test_settings_that_make_no_sense_and_fingerprints():
    for wrong in ({"fps": -1.0}, {"fps": 8.0, "interval": 2}):
        with pytest.raises(ValueError, match="fps is above 0, and interval then 1"):
            ClipSpec(**wrong)
    assert {"fps", "repeat"}.isdisjoint(ClipSpec().settings())  # caches of before still open
    assert ClipSpec(fps=8).settings() != ClipSpec(fps=7).settings()


def test_lengths_of_a_variable_rate_are_those_of_its_time_stamps(tmp_path):
    """The header says 25 frames a second; 30 frames come in 12 s, the first 15 of them in 2 s."""
    ticks = [*np.linspace(0, 2000, 15).astype(int), *np.linspace(2500, 12000, 15).astype(int)]
    (tmp_path / "data").mkdir()
    with av.open(str(tmp_path / "data" / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        for n, tick in enumerate(ticks):
            picture = np.full((16, 16, 3), n, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = int(tick), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    kept = {"index_dir": tmp_path / "index", "workers": 1, "val_fraction": 0}
    videos = open_source("folder", tmp_path / "data", **kept)
    assert videos.videos[0].record.fps == pytest.approx(29 / 12)
    for T, there in ((25, 1), (26, 0)):  # 12 s at 2 frames a second
        spec = ClipSpec(T, size=16, fps=2, position="start")
        if there:
            clip = VideoClips(videos, spec, train=False)[0]["video"][:, 0, 0, 0].tolist()
            assert clip == [int(np.searchsorted(ticks, 500 * k + 0.5, side="right")) - 1 for k in range(T)]
        else:
            with pytest.raises(ValueError, match="1 shorter than 26 frames, the longest 25"):
                VideoClips(videos, spec)
    (tmp_path / "list.csv").write_text("path,start_s,end_s\na.mkv,0,2.1\na.mkv,2.2,\n")
    parts = open_source("csv", tmp_path / "data", list_file=tmp_path / "list.csv", **kept).videos
    assert [parts[n].record.fps for n in (0, 1)] == pytest.approx([7, 14 / 9.5])  # each part has its own
