"""Damaged files are found, intact ones are not accused, and a dying decoder takes nothing down."""

import hashlib
import importlib
import os
import re
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import processes, scan
from data.finding import list_videos
from data.index import build_index
from data.scan import scan_file

# In the folder of damaged clips, but only odd: few frames, a small or an odd size.
ODD = {"odd_size.mkv", "one_frame.mp4", "three_frames.mp4", "tiny_16x16.mp4"}


def test_all_damaged_real_files_are_found_and_no_intact_one(assets):
    videos = list_videos(assets)
    damaged = {p for p in videos if p.parent.name == "derived" and p.name not in ODD}
    damaged.add(assets / "corrupt" / "corrupted.mp4")
    digests = {p: hashlib.sha256(p.read_bytes()).digest() for p in damaged}
    index = build_index(videos, workers=1)
    assert {Path(r.path) for r in index.damaged} == damaged
    assert len(damaged) == 18
    assert len(index.good) == 66
    assert all(0 < len(r.damaged) < 130 and "\n" not in r.damaged for r in index.damaged)
    reasons = {Path(r.path).name: r.damaged for r in index.damaged}
    assert reasons["mp4_flip20_seed0.mp4"] == "20 of 280 frames corrupt"
    assert reasons["ucf_truncated_99pct.avi"] == "1 of 259 frames corrupt"
    assert reasons["ucf_zero_tail.avi"] == "cut short: 154 of 259 frames"
    assert {p: hashlib.sha256(p.read_bytes()).digest() for p in damaged} == digests


def test_an_intact_file_gives_its_numbers(tmp_path, scene, encode):
    for codec, name in (("mpeg4", "a.avi"), ("libx264", "b.mp4"), ("ffv1", "c.mkv")):
        record = scan_file(encode(tmp_path / name, scene[:30, :40], codec))
        assert (record.num_frames, record.width, record.height, record.fps) == (30, 64, 40, 25.0)
        assert record.damaged == ""


def test_each_kind_of_damage_is_named(tmp_path, scene, encode):
    rough = scene // 2 + np.random.default_rng(0).integers(0, 128, scene.shape, dtype=np.uint8)
    whole = encode(tmp_path / "whole.avi", rough, "mpeg4", g=12).read_bytes()
    files = {
        "empty.avi": (b"", "empty file"),
        "text.mp4": (b"no video at all", "cannot be decoded"),
        "cut.avi": (whole[: len(whole) * 4 // 5], r"cut short: \d\d of 100 frames"),
        "holes.avi": (_holes(whole), "corrupt|decoder error|cannot be decoded|cut short"),
    }
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        assert scan_file(tmp_path / name).damaged, name
        assert re.search(reason, scan_file(tmp_path / name).damaged), name
    Image.fromarray(scene[0]).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "picture.mp4")
    assert scan_file(tmp_path / "picture.mp4").damaged == "a picture (png_pipe), not a video"


def test_each_cut_file_is_found_in_one_process(tmp_path, scene, encode):
    whole = encode(tmp_path / "whole.mkv", scene, "libx264").read_bytes()
    for name in ("a.mkv", "b.mkv"):  # PyAV drops a message that repeats the last one unless told otherwise
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert scan_file(tmp_path / name).damaged == "decoder error: File ended prematurely"


def _holes(content: bytes) -> bytes:
    changed = bytearray(content)
    for n in range(len(content) // 3, len(content) * 2 // 3, 50):
        changed[n] ^= 0x5A
    return bytes(changed)


def _frames(folder: Path, frames, numbers) -> Path:
    folder.mkdir(parents=True)
    for frame, n in zip(frames, numbers, strict=True):
        Image.fromarray(frame).save(folder / f"clip_frames_{n:08d}.jpg")
    return folder


def test_folders_of_frames_are_checked_for_gaps_sizes_and_unreadable_images(tmp_path, scene):
    assert scan_file(_frames(tmp_path / "good", scene[:6], range(3, 9))).damaged == ""
    assert scan_file(_frames(tmp_path / "every_third", scene[:4], (1, 4, 7, 10))).damaged == ""
    assert scan_file(tmp_path / "good").num_frames == 6
    gap = scan_file(_frames(tmp_path / "gap", scene[:5], (1, 2, 4, 5, 6))).damaged
    assert gap == "frames missing between clip_frames_00000002.jpg and clip_frames_00000004.jpg"
    size = _frames(tmp_path / "size", [*scene[:2], scene[2, :32]], (1, 2, 3))
    assert "differ in size" in scan_file(size).damaged
    torn = _frames(tmp_path / "torn", scene[:3], (1, 2, 3))
    victim = torn / "clip_frames_00000002.jpg"
    victim.write_bytes(victim.read_bytes()[:-300])
    assert "clip_frames_00000002.jpg" in scan_file(torn).damaged
    (tmp_path / "none").mkdir()
    assert scan_file(tmp_path / "none").damaged


BAD_WORKER = """
import os, signal, time
from pathlib import Path
from data import processes, scan

def scan_file(name):
    stem = Path(name).stem
    if "crash" in stem:
        os.abort()
    if "killed" in stem:
        os.kill(os.getpid(), signal.SIGKILL)
    if "once" in stem and not Path(name + ".seen").exists():
        Path(name + ".seen").touch()
        os.abort()
    while "spin" in stem:
        pass
    if "hang" in stem:
        time.sleep(600)
    if "broken" in stem:
        raise AttributeError("no attribute 'rotation'")
    return scan.scan_file(name)
"""


@pytest.fixture
def bad_worker(tmp_path, monkeypatch):
    """A scanning process that dies or hangs on files of such a name, in a module new processes can import."""
    (tmp_path / "bad_scan_worker.py").write_text(BAD_WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("bad_scan_worker")
    monkeypatch.setattr(scan, "scan_file", module.scan_file)
    yield module
    sys.modules.pop("bad_scan_worker")


def test_a_crash_or_a_hang_is_one_record_and_the_rest_goes_on(tmp_path, scene, encode, bad_worker):
    names = ("crash.avi", "a.avi", "hang.avi", "b.avi", "killed.avi", "spin.avi", "once.avi")
    paths = [encode(tmp_path / "data" / name, scene[:2], "mpeg4") for name in names]
    index = build_index(paths, tmp_path / "x.sqlite", workers=2, timeout_s=6)
    assert [(Path(r.path).name, r.damaged) for r in index.damaged] == [
        ("crash.avi", "the decoder crashed on this file"),
        ("hang.avi", "not decoded within 6 s"),
        ("killed.avi", "the decoder crashed on this file"),
        ("spin.avi", "not decoded within 6 s"),
    ]
    assert [Path(r.path).name for r in index.good] == ["a.avi", "b.avi", "once.avi"]
    with sqlite3.connect(tmp_path / "x.sqlite") as store:
        rows = dict(store.execute("SELECT path, damaged FROM scans"))
    # a process that somebody killed or stopped says nothing about its file: it is looked at again the next time
    assert {os.path.basename(path).decode(): reason for path, reason in rows.items()} == {
        "crash.avi": "the decoder crashed on this file",
        "spin.avi": "not decoded within 6 s",
        **dict.fromkeys(("a.avi", "b.avi", "once.avi"), ""),
    }


def test_a_fault_of_the_program_stops_the_scan_and_is_noted_against_no_file(
    tmp_path, scene, encode, bad_worker
):
    paths = [encode(tmp_path / f"{name}.avi", scene[:2], "mpeg4") for name in ("broken_1", "broken_2")]
    with pytest.raises(OSError, match=r"broken_\d.avi: AttributeError: no attribute 'rotation'"):
        build_index(paths, tmp_path / "x.sqlite", workers=1)
    with sqlite3.connect(tmp_path / "x.sqlite") as store:
        assert not list(store.execute("SELECT * FROM scans"))


def test_one_reason_for_the_first_twenty_files_is_no_fault_of_the_files(tmp_path, scene, encode):
    names = [tmp_path / f"{n}.avi" for n in range(25)]
    for name in names:
        name.write_bytes(b"RIFF")
    with pytest.raises(OSError, match=r"first 20 files all fail for one reason.*libavcodec"):
        build_index(names, tmp_path / "x.sqlite", workers=1)
    with sqlite3.connect(tmp_path / "x.sqlite") as store:
        assert not list(store.execute("SELECT * FROM scans"))
    good = encode(tmp_path / "good.avi", scene[:2], "mpeg4")
    for _ in range(2):  # the reader is well, and the second time it is known before the scan
        assert len(build_index([good, *names], tmp_path / "x.sqlite", workers=1).damaged) == len(names)
        names.append(tmp_path / f"{len(names)}.avi")
        names[-1].write_bytes(b"RIFF")


def test_a_verdict_of_another_version_of_the_reader_is_looked_at_again(tmp_path, scene, encode):
    good, bad = encode(tmp_path / "good.avi", scene[:2], "mpeg4"), tmp_path / "bad.avi"
    bad.write_bytes(b"RIFF")
    build_index([good, bad], tmp_path / "x.sqlite", workers=1)
    with sqlite3.connect(tmp_path / "x.sqlite") as store:
        store.execute("UPDATE scans SET reader = 'av 14.0.0', damaged = 'other', num_frames = 7")
        store.execute("UPDATE scans SET damaged = '' WHERE CAST(path AS TEXT) LIKE '%good%'")
    index = build_index([good, bad], tmp_path / "x.sqlite", workers=1)
    assert [r.num_frames for r in index.good] == [7]
    assert "cannot be decoded" in index.damaged[0].damaged


def test_a_process_that_cannot_start_accuses_no_file(tmp_path, scene, encode, bad_worker, monkeypatch):
    monkeypatch.setattr(processes, "_CODE", "raise SystemExit(3)")
    with pytest.raises(OSError, match="did not start"):
        build_index([encode(tmp_path / "a.avi", scene[:2], "mpeg4")], workers=1)


def test_real_processes_give_the_records_of_this_one(tmp_path, scene, encode):
    paths = [encode(tmp_path / f"{n}.avi", scene[: n + 2], "mpeg4") for n in range(5)]
    (tmp_path / "bad.avi").write_bytes(b"RIFF")
    index = build_index([*paths, tmp_path / "bad.avi"], workers=2)
    assert index.good == [scan_file(path) for path in paths]
    assert index.damaged == [scan_file(tmp_path / "bad.avi")]
    with pytest.raises(ValueError, match="workers=0"):
        build_index(paths, workers=0)
