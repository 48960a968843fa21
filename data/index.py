"""The scans of a data set, kept in one SQLite file: a scan that is stopped continues where it was.

A row is committed soon after its file was scanned, so a kill costs seconds of work, not the 440k videos before.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import by_decord
from data.finding import IMAGE_SUFFIXES
from data.processes import Pool
from data.progress import Progress
from data.scan import MEMORY_BYTES, ScanRecord, plausible, reader_name, scan_all
from data.table import Blobs
from data.timeline import packed_rate

logger = logging.getLogger(__name__)

_VERSION = 3
_NUMBERS = {"num_frames": np.int32, "width": np.int32, "height": np.int32, "fps": np.float64}
_COMMIT_EVERY_S = 5.0
_TABLE = """CREATE TABLE IF NOT EXISTS scans (path BLOB PRIMARY KEY, files INT, bytes INT, changed INT,
 num_frames INT, width INT, height INT, fps REAL, damaged TEXT, times BLOB, reader TEXT) WITHOUT ROWID"""
_FIND = """SELECT n, num_frames, width, height, fps, damaged, times, files, bytes, changed, reader
 FROM asked CROSS JOIN scans USING (path)"""  # CROSS: in the order of asked
_DECORD = """CREATE TABLE IF NOT EXISTS decord (path BLOB PRIMARY KEY, files INT, bytes INT, changed INT,
 agrees INT, reader TEXT) WITHOUT ROWID"""
_STORE = "INSERT OR REPLACE INTO scans VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True)
class Index:
    """The scan of a set of files, in the order asked."""

    good: list[ScanRecord]
    damaged: list[ScanRecord]


@dataclass(frozen=True)
class Scans:
    """The scan of n files in columns, in the order asked: num_frames, width, height int32 (n,), fps float64 (n,).

    damaged: number of the file -> reason. times: as data/timeline.py packs them.
    """

    num_frames: np.ndarray
    width: np.ndarray
    height: np.ndarray
    fps: np.ndarray
    damaged: dict[int, str]
    times: Blobs

    @classmethod
    def empty(cls, count: int) -> Scans:
        """Make columns for `count` files, to be filled."""
        numbers = {name: np.zeros(count, dtype) for name, dtype in _NUMBERS.items()}
        return cls(**numbers, damaged={}, times=Blobs(count))

    def put(self, rows: list[tuple]) -> None:
        """Put in rows: number of the file, num_frames, width, height, fps, damaged, times."""
        numbers = [row[0] for row in rows]
        for at, name in enumerate(_NUMBERS, 1):
            getattr(self, name)[numbers] = [row[at] for row in rows]
        for n, *_, reason, packed_times in rows:
            if reason:
                self.damaged[n] = reason
            self.times.put(n, packed_times)


def build_index(
    paths: Sequence[str | Path],
    cache_file: str | Path | None = None,
    workers: int = 2,
    timeout_s: float = 120.0,
) -> Index:
    """Scan as `scan_paths` does, into records, for some thousands of files."""
    names = list(dict.fromkeys(map(str, paths)))
    scans = scan_paths(names, cache_file, workers, timeout_s)
    index = Index([], [])
    for n, name in enumerate(names):
        numbers = int(scans.num_frames[n]), int(scans.width[n]), int(scans.height[n]), float(scans.fps[n])
        record = ScanRecord(name, *numbers, scans.damaged.get(n, ""), scans.times[n])
        (index.damaged if record.damaged else index.good).append(record)
    return index


def scan_paths(
    paths: Sequence[str],
    cache_file: str | Path | None = None,
    workers: int = 2,
    timeout_s: float = 120.0,
) -> Scans:
    """Scan files and folders of frames; those unchanged since the last scan (size, time) come from the cache.

    A file that another version of the reader called damaged is looked at again; a reason that may be gone the next time
    (no permission, a process that was killed) is not kept. Raises OSError for a fault of the machine.

    paths: each once. cache_file: SQLite, should not lie among the data; None: nothing is kept.
    workers: processes. timeout_s: seconds for one file, after which it is left out.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: the scan needs at least one process")
    scans, known_good = Scans.empty(len(paths)), False
    # Known and unchanged files come from the store; damage is trusted only if this reader found it.
    todo = dict.fromkeys(range(len(paths)))
    with _store(cache_file) as store:
        for rows in _stored(store, paths):
            kept = []
            for n, num_frames, width, height, fps, reason, packed, *stamp, reader in rows:
                if tuple(stamp) != _stamp(paths[n]) or (reason and reader != reader_name()):
                    continue
                # An older index has the rate that the file states, which the time stamps may not have.
                kept.append((n, num_frames, width, height, packed_rate(packed, fps), reason, packed))
                known_good |= not reason and reader == reader_name()
                del todo[n]
            scans.put(kept)
        # The others are scanned by worker processes and stored as they come.
        if todo:
            logger.info("scanning %d of %d videos for damage", len(todo), len(paths))
            for n, record in _scan_and_store(store, paths, todo, workers, timeout_s, known_good):
                scans.put([(n, *_values(record))])
    return dataclasses.replace(scans, damaged=dict(sorted(scans.damaged.items())))


def decord_agrees(
    paths: Sequence[str],
    scans: Scans,
    cache_file: str | Path | None = None,
    workers: int = 2,
    timeout_s: float = 120.0,
) -> np.ndarray:
    """Find which of the files scanned decord reads as PyAV does, bool (n,); compared once (data/by_decord.py) and kept.

    A file on which it crashes or hangs takes a process of the comparison with it, and is left to PyAV.
    """
    answer = np.zeros(len(paths), bool)
    if not (name := by_decord.version()):
        return answer
    reader = f"{name}, {reader_name()}"
    files = [n for n in range(len(paths)) if n not in scans.damaged and scans.times[n]]
    with _store(cache_file) as store, Pool(workers, timeout_s, MEMORY_BYTES) as pool:
        # What is known of unchanged files, with these versions of both readers.
        store.execute(_DECORD)
        rows = store.execute("SELECT * FROM decord WHERE reader = ?", (reader,))
        known = {row[:4]: row[4] for row in rows}
        keys = {n: (os.fsencode(paths[n]), *_stamp(paths[n])) for n in files}
        todo = [n for n in files if keys[n] not in known]
        if todo:
            logger.info("comparing decord with PyAV on %d of %d videos", len(todo), len(paths))
        # The others are compared; True, False, or a BadVideo of a process that died or hung.
        compared = pool.in_order(((by_decord.agrees, paths[n]) for n in todo), 2 * workers)
        for n, found in zip(todo, compared, strict=True):
            known[keys[n]] = found is True
            if found in (True, False) or found.final:
                store.execute(
                    "INSERT OR REPLACE INTO decord VALUES (?, ?, ?, ?, ?, ?)",
                    (*keys[n], found is True, reader),
                )
                store.commit()
        answer[files] = [known[keys[n]] for n in files]
    logger.info("decord reads %d of %d videos, PyAV the others", answer.sum(), len(paths))
    return answer


def _stored(store: sqlite3.Connection, paths: Sequence[str]) -> Iterator[list[tuple]]:
    """Yield rows (number of the file, its numbers, damaged, times, stamp, reader) of those of the files that are in the table."""
    store.execute("CREATE TEMP TABLE asked (path BLOB, n INT)")
    order = sorted(range(len(paths)), key=paths.__getitem__)  # as the table is, so that pages are read once
    store.executemany("INSERT INTO asked VALUES (?, ?)", ((os.fsencode(paths[n]), n) for n in order))
    store.commit()
    found = store.execute(_FIND)
    while rows := found.fetchmany(10_000):
        yield rows


def _values(record: ScanRecord) -> tuple:
    return record.num_frames, record.width, record.height, record.fps, record.damaged, record.times


def _scan_and_store(
    store: sqlite3.Connection,
    paths: Sequence[str],
    todo: Iterable[int],
    workers: int,
    timeout_s: float,
    known_good: bool,
) -> Iterator[tuple[int, ScanRecord]]:
    """Scan the files `todo`, yield (number, record) of each, and put what is final into the table."""
    committed = time.monotonic()
    stamps = {paths[n]: (n, _stamp(paths[n])) for n in todo}  # before the scan: a file may change meanwhile
    bar = Progress(len(stamps), "scan", "video")
    rows: list[tuple] = []

    # Together and at once: a transaction that is open while a long film is decoded would shut other programs out.
    def keep() -> None:
        store.executemany(_STORE, rows)
        store.commit()
        rows.clear()

    try:
        records = scan_all(list(stamps), min(workers, len(stamps)), timeout_s)
        for record in records if known_good else plausible(records):
            n, stamp = stamps[record.path]
            if record.final:
                key = os.fsencode(record.path)
                rows.append((key, *stamp, *_values(record), reader_name()))
            now = time.monotonic()
            if now - committed > _COMMIT_EVERY_S:
                keep()
                committed = now
            bar.update()
            yield n, record
    finally:
        bar.close()
        keep()


def _stamp(path: str) -> tuple[int, int, int]:
    """Stamp a video with (files, bytes, newest change in ns), which differ when a file, or any frame of a folder, was changed."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0, 0  # a dangling link: the scan will say so
    if not stat.S_ISDIR(status.st_mode):
        return 1, status.st_size, status.st_mtime_ns
    # A folder: all of its frames together.
    count = size = newest = 0
    with os.scandir(path) as entries:
        for entry in entries:
            with suppress(OSError):  # a link that leads nowhere: the scan will say so
                if entry.name.lower().endswith(IMAGE_SUFFIXES):
                    status = entry.stat()
                    count, size = count + 1, size + status.st_size
                    newest = max(newest, status.st_mtime_ns)
    return count, size, newest


@contextmanager
def _store(cache_file: str | Path | None) -> Iterator[sqlite3.Connection]:
    """Open the table, made if there is none; a file with another schema is renamed to .old and not used."""
    if cache_file is not None:
        Path(cache_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(_connect(cache_file)) as store:
            yield store
    except sqlite3.DatabaseError as error:
        raise OSError(
            f"{cache_file}: the index of scans cannot be read or written: {error}; if it is damaged, delete it"
        ) from error


def _connect(cache_file: str | Path | None) -> sqlite3.Connection:
    """Connect to a table of this version, in memory for no file."""
    store = sqlite3.connect(cache_file or ":memory:", timeout=120)
    # Locked, or no disk, is an error; anything else that is wrong with the file is a reason to begin another.
    try:
        version = store.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            store.execute(_TABLE)
            store.execute(f"PRAGMA user_version = {_VERSION}")
            version = _VERSION
        reason = "" if version == _VERSION else f"written by version {version}"
    except sqlite3.OperationalError:
        store.close()
        raise
    except sqlite3.DatabaseError as error:
        reason = str(error)
    if not reason:
        return store
    store.close()
    old = f"{cache_file}.old"
    os.replace(cache_file, old)
    logger.warning("%s: not an index of this version (%s); now %s; scanning again", cache_file, reason, old)
    return _connect(cache_file)
