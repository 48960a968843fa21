"""Stage one's 440k videos, and a million: seconds to start, bounded memory, nothing copied into the workers."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import index as index_module
from data.scan import ScanRecord, reader_name
from data.table import VideoTable
from data.timeline import pack_times

PROGRAM = """
import json, os, sys, time
import av
from data import index, lists
from data.clip import ClipSpec
from data.dataset import VideoClips
from data.sources import open_source

folder, count = sys.argv[1], int(sys.argv[2])
# No million files: the folder is listed, and each file looks, as the index says.
lists.files_below = lambda root: [f"{n % 1000:06d}/{n}.mp4" for n in range(count)]
index._stamp = lambda path: (1, 2, 3)

def private():
    rows = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    sizes = {row.split(":")[0]: int(row.split()[1]) for row in rows}
    return (sizes["Private_Clean"] + sizes["Private_Dirty"]) >> 10

begin = time.process_time()
source = open_source("webvid", f"{folder}/data", list_file=f"{folder}/list.csv", index_dir=f"{folder}/index", val_fraction=0.01)
clips = VideoClips(source, ClipSpec(num_frames=81))
seconds = time.process_time() - begin
peak = next(int(row.split()[1]) >> 10 for row in open("/proc/self/status") if row.startswith("VmHWM"))
read, write = os.pipe()
if os.fork() == 0:
    for n in range(0, len(clips), 5):
        clips.videos[n].record.num_frames
    os.write(write, str(private()).encode())
    os._exit(0)
os.wait()
worker = int(os.read(read, 100))
print(json.dumps({"videos": len(clips), "seconds": seconds, "peak": peak, "worker": worker}))
"""


def start(tmp_path, count):
    """Start on a list of `count` videos that were scanned before; returns what it took."""
    data = tmp_path / "data"
    data.mkdir()
    with open(tmp_path / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        rows.writerows(
            [n, f"https://x/{n}.mp4", "PT00H00M15S", f"{n % 1000:06d}", "a road, snow"] for n in range(count)
        )
    times = {frames: pack_times(range(0, 1001 * frames, 1001), 1, 30000) for frames in range(60, 560)}
    (tmp_path / "index").mkdir()
    with index_module._store(tmp_path / "index" / "webvid-index.sqlite") as store:
        for n in range(count):
            path = os.fsencode(data / f"{n % 1000:06d}" / f"{n}.mp4")
            values = (
                60 + n % 500,
                596,
                336,
                29.97,
                "" if n % 1000 else "cut short",
                times[60 + n % 500],
                reader_name(),
            )
            store.execute(index_module._STORE, (path, 1, 2, 3, *values))
        store.commit()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(count)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_workers_do_not_copy_the_list_of_videos(tmp_path):
    took = start(tmp_path, 50_000)
    assert took["videos"] == pytest.approx(50_000 * 0.99 * 480 / 500, rel=0.01)
    assert took["worker"] < 30  # MiB; as Python objects it was the whole list
    assert took["peak"] < 250


@pytest.mark.slow
def test_a_list_of_a_million_videos_opens_in_seconds(tmp_path, capsys):
    took = start(tmp_path, 1_000_000)
    with capsys.disabled():
        print(f"\na million videos: {took}")
    assert took["seconds"] < 60
    assert took["peak"] < 800
    assert took["worker"] < 40


def test_a_table_holds_what_was_put_in_at_about_a_hundred_bytes_a_video():
    count = 1000
    names = [f"{n % 10:06d}_{n:06d}/{n} é\udcff.mp4" for n in range(count)]
    columns = {"num_frames": np.arange(count, dtype=np.int32), "fps": np.full(count, 29.97)}
    columns |= {key: np.full(count, 64, np.int32) for key in ("width", "height", "label")}
    table = VideoTable("/data", names, columns)
    video = table[7]
    assert (video.name, video.label, video.first, video.tick) == (names[7], 64, 0, None)
    assert video.record == ScanRecord(f"/data/{names[7]}", 7, 64, 64, 29.97)
    part = table.select(table.column("num_frames") % 2 == 1)[3:]
    assert ([v.record.num_frames for v in part][:2], len(part), part.name(0)) == ([7, 9], 497, names[7])
    assert (part[-1].name, table[-1].name) == (names[999], names[999])
    for wrong in (497, -498):
        with pytest.raises(IndexError):
            part[wrong]
    arrays = [*columns.values(), table.files.ends, table.files.bytes, table.rows]
    assert sum(array.nbytes for array in arrays) < 110 * count
    assert part.columns is table.columns
