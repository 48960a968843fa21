"""A decoder that crashes, hangs or is killed costs one process and is named; a fault of the machine stops the program."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import dataset
from data.clip import ClipSpec
from data.dataset import VideoClips
from data.decoder import BadVideo
from data.loader import StepBatches, make_loader
from data.processes import Pool
from data.sources import open_source

ROOT = Path(__file__).parents[3]
JOBS = """
import os, signal, time
from data import dataset
from data.decoder import BadVideo

def echo(value): return value
def bad(path): raise BadVideo(f"{path}: torn")
def broken(path): return {}[path]
def crash(path): os.abort()
def hang(path): time.sleep(600)
def pid(): return os.getpid()

def read_clip(video, *args):
    stem = video.name.split(".")[0]
    if stem == "2": os.abort()
    if stem == "4": time.sleep(600)
    return read(video, *args)

def fault(video, *args): raise ImportError("libfoo.so: cannot map")

read = dataset.read_clip
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Functions in a module that the processes can import."""
    (tmp_path / "pool_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    import pool_jobs

    yield pool_jobs
    sys.modules.pop("pool_jobs")


def test_outcomes_come_in_order_and_a_bad_file_is_one_of_them(jobs):
    with Pool(2) as pool:
        work = [(jobs.bad, n) if n % 5 == 3 else (jobs.echo, n) for n in range(20)]
        outcomes = list(pool.in_order(work, ahead=6))
    assert [o for o in outcomes if not isinstance(o, BadVideo)] == [n for n in range(20) if n % 5 != 3]
    assert [str(o) for o in outcomes if isinstance(o, BadVideo)] == [f"{n}: torn" for n in (3, 8, 13, 18)]


def test_a_crash_and_a_hang_are_told_and_the_other_jobs_are_done(jobs):
    with Pool(2, timeout_s=2) as pool:
        outcomes = list(
            pool.in_order([(jobs.echo, 1), (jobs.crash, "x"), (jobs.hang, "y"), (jobs.echo, 2)], ahead=4)
        )
    assert outcomes[::3] == [1, 2]
    assert (str(outcomes[1]), outcomes[1].final) == ("the decoder crashed on this file", True)
    assert (str(outcomes[2]), outcomes[2].final) == ("not decoded within 2 s", False)


def test_any_other_error_stops_the_program_with_its_cause(jobs):
    with Pool(1) as pool, pytest.raises(OSError, match="video.mp4: KeyError: .*not of the file"):
        list(pool.in_order([(jobs.broken, "video.mp4")], ahead=1))


def test_the_processes_ignore_the_signals_of_the_group_and_end_with_the_program(jobs):
    with Pool(1) as pool:
        process = next(pool.in_order([(jobs.pid,)], 1))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(process, number)
        assert next(pool.in_order([(jobs.pid,)], 1)) == process
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    code = "from data.processes import Pool; import os, time, pool_jobs\n"
    code += "pool = Pool(1); print(next(pool.in_order([(pool_jobs.pid,)], 1)), flush=True)\n"
    code += "pool.submit(pool_jobs.hang, 0); time.sleep(60)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True
    ) as program:
        process = int(program.stdout.readline())
        program.kill()
    for _ in range(100):
        time.sleep(0.1)
        if not Path(f"/proc/{process}").exists():
            return
    pytest.fail("a process outlived its program")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_before_a_process_is_ready_does_not_end_it(jobs, number):
    with Pool(1) as pool:
        pool.submit(jobs.pid)
        process = pool._processes[0].process.pid
        os.kill(process, number)  # it has not even begun to import
        assert pool.wait() == (1, process)


@pytest.fixture
def clips(tmp_path, scene, encode):
    for n in range(6):
        encode(tmp_path / "data" / f"{n}.avi", scene[n * 10 : n * 10 + 10], "mpeg4")
    return VideoClips(open_source("folder", tmp_path / "data", workers=1), ClipSpec(4, size=16), seed=2)


def batches(clips, count):
    loader = make_loader(clips, StepBatches(0, 2, 2), 2)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def test_a_file_that_kills_or_hangs_its_reader_is_passed_over_by_name(clips, jobs, monkeypatch):
    monkeypatch.setattr(dataset, "read_clip", jobs.read_clip)
    monkeypatch.setattr(Pool.__init__, "__defaults__", (2.0, 0))
    seen = batches(clips, 3)
    passed = " ".join(text for batch in seen for text in batch["passed_over"])
    assert "folder/2.avi" in passed
    assert "crashed" in passed
    assert "folder/4.avi" in passed
    assert "not decoded within 2 s" in passed
    assert {2, 4}.isdisjoint(int(n) for batch in seen for n in batch["index"])


def test_a_fault_of_the_machine_in_a_loader_stops_it_and_names_no_video_as_bad(clips, jobs, monkeypatch):
    monkeypatch.setattr(dataset, "read_clip", jobs.fault)
    with pytest.raises(OSError, match=r"data/\d.avi: ImportError: libfoo.so: cannot map"):
        batches(clips, 1)
    assert not clips.failed


def test_clips_need_no_shared_memory(clips, monkeypatch):
    before = set(os.listdir("/dev/shm"))
    loader = make_loader(clips, StepBatches(0, 2, 2), 2)
    next(loader)
    assert set(os.listdir("/dev/shm")) <= before
    loader.close()


OLD_AV = """
# av 14.0 had no VideoFrame.rotation
import os, sys
here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.remove(here)
del sys.modules["av"]
import av
sys.path.insert(0, here)

class Shadow:
    def __init__(self, real): self._real = real
    def __getattr__(self, name):
        if name == "rotation":
            raise AttributeError("'av.video.frame.VideoFrame' object has no attribute 'rotation'")
        return getattr(self._real, name)
    def __enter__(self): return self
    def __exit__(self, *_): self._real.close()
    def demux(self, *args): return map(Shadow, self._real.demux(*args))
    def decode(self, *args): return map(Shadow, self._real.decode(*args))

real_open = av.open
av.open = lambda *args, **more: Shadow(real_open(*args, **more))
av.__version__ = "14.0.0"
"""
SCAN = "import sys; from data.index import build_index; i = build_index(sys.argv[2:], sys.argv[1], 1); print(len(i.good), len(i.damaged))"


def test_an_old_package_stops_the_scan_and_a_good_one_then_finds_every_file_well(tmp_path, scene, encode):
    paths = [str(encode(tmp_path / "data" / f"{n}.mp4", scene[:4], "libx264")) for n in range(3)]
    (tmp_path / "old" / "av").mkdir(parents=True)
    (tmp_path / "old" / "av" / "__init__.py").write_text(OLD_AV)

    def scan(*path):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
        command = [sys.executable, "-c", SCAN, str(tmp_path / "x.sqlite"), *paths]
        return subprocess.run(command, env=env, cwd=ROOT.parent, capture_output=True, text=True)

    first = scan(str(tmp_path / "old"))
    assert first.returncode == 1
    assert "has no attribute 'rotation'; a fault of this machine or program" in first.stderr
    second = scan()
    assert second.stdout.split() == ["3", "0"], second.stderr
