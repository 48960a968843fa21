"""The kept scans: only what changed is scanned again, a killed scan goes on, a strange file is set aside."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from data import index as index_module
from data.index import build_index, scan_paths
from data.scan import scan_file
from tests.unit.data.test_cut import write

UNEVEN = [0, 40, 73, 500, 510, 900, 1700, 1733, 2400, 2440, 4000, 4400]  # ms


@pytest.fixture
def asked(monkeypatch):
    """Names of the files of each scan, which runs in this process."""
    asked = []

    def scan_all(names, workers, timeout_s):
        asked.append([Path(name).name for name in names])
        return map(scan_file, names)

    monkeypatch.setattr(index_module, "scan_all", scan_all)
    return asked


def test_only_what_changed_is_scanned_again(tmp_path, scene, encode, asked):
    paths = [encode(tmp_path / "data" / f"{n}.avi", scene[:5], "mpeg4") for n in range(3)]
    cache = tmp_path / "index" / "x.sqlite"
    first = build_index(paths, cache)
    assert first.good == [scan_file(path) for path in paths]
    assert build_index(paths, cache) == first
    paths[1].write_bytes(paths[1].read_bytes()[:900])
    paths.append(encode(tmp_path / "data" / "3.avi", scene[:5], "mpeg4"))
    index = build_index(paths, cache)
    assert asked[0] == ["0.avi", "1.avi", "2.avi"]
    assert [names for names in asked[1:] if names] == [["1.avi", "3.avi"]]
    assert [Path(r.path).name for r in index.damaged] == ["1.avi"]
    assert build_index(paths, cache) == index  # the reason is kept too


def test_a_file_that_is_no_index_is_set_aside_and_the_scan_begins_anew(
    tmp_path, scene, encode, asked, caplog
):
    path = encode(tmp_path / "data" / "a.avi", scene[:5], "mpeg4")
    cache = tmp_path / "x.sqlite"
    cache.write_text("{ not a table, and longer than the head of one would have to be }" * 20)
    assert len(build_index([path], cache).good) == 1
    assert "scanning again" in caplog.text
    assert (tmp_path / "x.sqlite.old").read_text().startswith("{ not a table")
    build_index([path], cache)
    with sqlite3.connect(cache) as store:
        store.execute("PRAGMA user_version = 99")
    store.close()
    build_index([path], cache)
    assert [names for names in asked if names] == [["a.avi"]] * 2
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(OSError, match="cannot be read or written"):
        build_index([path], tmp_path / "folder.sqlite")


def test_the_rate_of_an_index_of_before_is_that_of_the_time_stamps(tmp_path, asked):
    write(tmp_path / "a.mkv", UNEVEN, Fraction(1, 1000))
    write(tmp_path / "b.mkv", range(0, 480, 40), Fraction(1, 1000))
    cache, paths = tmp_path / "x.sqlite", [str(tmp_path / name) for name in ("a.mkv", "b.mkv")]
    fresh = scan_paths(paths, cache).fps
    assert fresh.tolist() == pytest.approx([11 / 4.4, 25])
    with sqlite3.connect(cache) as store:  # what was kept then: the rate that the file states
        store.execute("UPDATE scans SET fps = 30")
    store.close()
    assert scan_paths(paths, cache).fps.tolist() == fresh.tolist()
    assert [len(names) for names in asked if names] == [2]  # and nothing was scanned again


def test_the_order_and_the_names_asked_do_not_matter(tmp_path, scene, encode, asked):
    data = tmp_path / "data"
    paths = [
        str(encode(data / name, scene[:3], "mpeg4")) for name in ("b.avi", "\udcff.avi", "\xe9 \u4e2d.avi")
    ]
    cache = tmp_path / "x.sqlite"
    forth = scan_paths(paths, cache)
    (data / "a.avi").write_bytes(b"RIFF")
    back = scan_paths([*reversed(paths), str(data / "a.avi")], cache)
    assert list(back.num_frames) == [3, 3, 3, 0]
    assert list(forth.num_frames) == [3, 3, 3]
    assert list(back.damaged) == [3]
    assert [names for names in asked if names][1:] == [["a.avi"]]


KILLED = """
import sys, time
from pathlib import Path
from data import index
from data.scan import scan_file

def scan_all(names, workers, timeout_s):
    for n, name in enumerate(names):
        if n == 40:
            print("forty", flush=True)
            time.sleep(60)
        yield scan_file(name)

index._COMMIT_EVERY_S = 0
index.scan_all = scan_all
index.scan_paths(sorted(map(str, Path(sys.argv[1]).iterdir())), sys.argv[2])
"""


def test_a_killed_scan_goes_on_where_it_was(tmp_path, scene, encode, asked):
    first = encode(tmp_path / "data" / "00.avi", scene[:2], "mpeg4")
    for n in range(1, 50):
        first.with_name(f"{n:02d}.avi").write_bytes(first.read_bytes())
    cache = tmp_path / "x.sqlite"
    command = [sys.executable, "-c", KILLED, str(first.parent), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "forty\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    scans = scan_paths(sorted(map(str, first.parent.iterdir())), cache)
    assert asked == [[f"{n}.avi" for n in range(40, 50)]]
    assert list(scans.num_frames) == [2] * 50


def test_another_program_may_write_while_a_long_film_is_scanned(tmp_path, scene, encode, monkeypatch):
    paths = [encode(tmp_path / "data" / f"{n}.avi", scene[:5], "mpeg4") for n in range(3)]
    cache, free = tmp_path / "x.sqlite", []

    def scan_all(names, workers, timeout_s):
        for name in names:  # asked between two files
            with sqlite3.connect(cache, timeout=0.05) as store:
                store.execute("BEGIN IMMEDIATE")
            store.close()
            free.append(name)
            yield scan_file(name)

    monkeypatch.setattr(index_module, "scan_all", scan_all)
    assert len(build_index(paths, cache).good) == len(free) == 3
    assert build_index(paths, cache).good == [scan_file(path) for path in paths]


def test_same_size_and_folders_of_frames_count_as_changed(tmp_path, scene, encode, asked):
    video, folder = encode(tmp_path / "data" / "a.avi", scene[:5], "mpeg4"), tmp_path / "data" / "frames"
    folder.mkdir()
    for n in range(3):
        Image.fromarray(scene[n]).save(folder / f"{n}.png")
    cache, paths = tmp_path / "x.sqlite", [video, folder]
    assert not build_index(paths, cache).damaged
    later = time.time_ns() + 10**12

    def overwrite(path):
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(later, later))

    overwrite(video)
    assert [Path(r.path).name for r in build_index(paths, cache).damaged] == ["a.avi"]
    Image.fromarray(scene[3]).save(folder / "3.png")
    assert [r.num_frames for r in build_index(paths, cache).good] == [4]
    overwrite(folder / "1.png")
    assert [Path(r.path).name for r in build_index(paths, cache).damaged] == ["a.avi", "frames"]
    assert [names for names in asked if names][1:] == [["a.avi"], ["frames"], ["frames"]]
