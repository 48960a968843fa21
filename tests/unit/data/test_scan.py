"""Damaged files are found, intact ones are not accused, and a dying decoder takes nothing down."""

import hashlib
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import scan
from data.index import build_index
from data.scan import scan_file
from data.video import list_videos

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
import os, time
from data.scan import scan_file

def worker(connection):
    connection.send(None)
    while True:
        name = connection.recv()
        stem = os.path.basename(name)
        if "crash" in stem:
            os._exit(1)
        if "hang" in stem:
            time.sleep(600)
        connection.send(scan_file(name))

def stillborn(connection):
    connection.close()
"""


@pytest.fixture
def bad_worker(tmp_path, monkeypatch):
    """A scanning process that dies or hangs on files of such a name, in a module new processes can import."""
    (tmp_path / "bad_scan_worker.py").write_text(BAD_WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("bad_scan_worker")
    monkeypatch.setattr(scan, "_worker", module.worker)
    yield module
    sys.modules.pop("bad_scan_worker")


def test_a_crash_or_a_hang_is_one_record_and_the_rest_goes_on(tmp_path, scene, encode, bad_worker):
    names = ("crash_1.avi", "a.avi", "hang.avi", "b.avi", "crash_2.avi", "c.avi")
    paths = [encode(tmp_path / "data" / name, scene[:2], "mpeg4") for name in names]
    index = build_index(paths, workers=2, timeout_s=1)
    assert [(Path(r.path).name, r.damaged) for r in index.damaged] == [
        ("crash_1.avi", "the decoder crashed on this file"),
        ("hang.avi", "not decoded within 1 s"),
        ("crash_2.avi", "the decoder crashed on this file"),
    ]
    assert [Path(r.path).name for r in index.good] == ["a.avi", "b.avi", "c.avi"]


def test_a_process_that_cannot_start_accuses_no_file(tmp_path, scene, encode, bad_worker, monkeypatch):
    monkeypatch.setattr(scan, "_worker", bad_worker.stillborn)
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
