"""Clips by time stamp are exact to the frame, at any rate, and read without decoding what lies before them."""

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import video as video_module
from data.cut import parse_time, read_cut, show_time
from data.scan import scan_file
from data.timeline import cut_between, pack_times
from data.video import read_frames

COUNT = 90


def numbered(n: int) -> np.ndarray:
    """A picture that carries n: eight vertical bars, dark or bright."""
    bits = np.array([255 * (n >> bit & 1) for bit in range(8)], np.uint8)
    return np.broadcast_to(bits.repeat(8)[None, :, None], (32, 64, 3)).copy()


def number_of(frame: np.ndarray) -> int:
    means = frame.astype(float).mean(axis=(0, 2)).reshape(8, 8).mean(1)
    return int(sum(1 << bit for bit in range(8) if means[bit] > 127))


def write(path, ticks, time_base, codec="libx264", **options):
    """A video whose frame n shows n and has presentation time ticks[n] * time_base."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.time_base = stream.time_base = time_base
        for n, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(numbered(n), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


RATES = {
    "25": (list(range(COUNT)), Fraction(1, 25)),
    "29.97": ([1001 * n for n in range(COUNT)], Fraction(1, 30000)),
    "variable": (np.cumsum(np.random.default_rng(0).integers(100, 9000, COUNT)).tolist(), Fraction(1, 90000)),
}


@pytest.fixture(params=RATES)
def video(request, tmp_path):
    """(path, exact times in seconds from frame 0), H.264 with B-frames and a key frame every 12."""
    ticks, base = RATES[request.param]
    path = write(tmp_path / "v.mp4", ticks, base, bf=3, g=12, crf=10)
    return path, [(tick - ticks[0]) * base for tick in ticks]


def test_a_cut_begins_at_the_first_frame_not_before_and_ends_with_the_last_before_the_end(video):
    path, times = video
    packed = scan_file(path).times
    assert len(packed) < 500
    rng = np.random.default_rng(1)
    cuts = np.sort(rng.integers(0, int(times[-1] * 1000) + 300, (40, 2)), axis=1).tolist()
    on_a_frame = [int(t * 1000) for t in times[::9] if t * 1000 == int(t * 1000)]
    cuts += [[0, 1], [0, 10**7], *([t, t + 200] for t in on_a_frame), *([0, t] for t in on_a_frame if t)]
    assert len(cuts) > 42
    for begin, end in cuts:
        inside = [n for n, t in enumerate(times) if Fraction(begin, 1000) <= t < Fraction(end, 1000)]
        first, stop, tick = cut_between(packed, begin, end, 0.0)[:3]
        assert list(range(first, stop)) == inside
        if len(inside) > 1 and begin % 3 == 0:
            frames = read_cut(path, first, tick, range(stop - first))
            assert [number_of(frame) for frame in frames] == inside


def test_a_cut_reads_the_frames_that_reading_from_the_beginning_gives(video, monkeypatch):
    path, times = video
    packed = scan_file(path).times
    first, stop, tick = cut_between(packed, 1500, int(times[-1] * 1000), 0.0)[:3]
    expected = read_frames(path, [first + n for n in (5, 0, 3, 0)], None)
    asked = []
    slow = video_module._from_the_beginning
    monkeypatch.setattr(video_module, "_from_the_beginning", lambda *g: asked.append(g) or slow(*g))
    for known in (packed, b""):
        assert (read_cut(path, first, tick, [5, 0, 3, 0], known) == expected).all()
    assert not asked  # it was entered at a key frame
    assert (read_cut(path, first, tick + 1, [0]) == expected[1]).all()  # no frame of that time: not trusted
    with pytest.raises(ValueError, match=f"frame {first + stop} asked"):
        read_cut(path, first, tick, [stop])
    assert asked == [(path, [first]), (path, [first + stop])]


def test_a_first_frame_that_is_not_at_zero_counts_as_zero(tmp_path):
    path = write(tmp_path / "v.mkv", [500 + 40 * n for n in range(30)], Fraction(1, 1000), bf=0, g=5)
    first, stop, tick = cut_between(scan_file(path).times, 80, 200, 0.0)[:3]
    assert (first, stop) == (2, 5)
    assert [number_of(f) for f in read_cut(path, first, tick, range(3))] == [2, 3, 4]


def test_times_that_do_not_rise_or_are_unknown_cannot_be_cut():
    assert pack_times([0, 2, 1], 1, 25) == b""
    assert pack_times([0, None], 1, 25) == b""
    assert pack_times([], 1, 25) == b""
    assert cut_between(pack_times([7], 1, 25), 0, 40, 0.0)[:3] == (0, 1, 7)
    assert cut_between(pack_times([7], 1, 25), 40, 80, 0.0)[:3] == (1, 1, 0)
    assert len(pack_times(range(0, 100_000 * 512, 512), 1, 12800)) < 2000  # an hour


@given(st.integers(0, 10**8))
def test_a_time_shown_is_the_time_read(ms):
    assert parse_time(show_time(ms)) == ms


def test_times_are_read_exactly_or_not_at_all():
    assert [parse_time(t) for t in ("0:00:10.060", "1:02:03", "00:00:00.5", "0:0:1.250000")] == [
        10060,
        3723000,
        500,
        1250,
    ]
    for text in ("10.06", "0:60:00", "0:00:61", "0:00:01.0001", "-0:00:01", "", "0:00:01.5 + 1"):
        with pytest.raises(ValueError, match="time"):
            parse_time(text)
