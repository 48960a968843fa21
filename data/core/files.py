"""Files that are whole or absent, and their digests. Used by every package; nothing here knows about videos."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

MARK_FILE = ".omnilatte.json"  # in a folder of output: which program fills it
_WEEK_S = 7 * 24 * 3600
_UMASK = os.umask(0)
os.umask(_UMASK)


@cache
def machine() -> str:
    """Name the machine inside which process numbers mean the same processes: host, boot and container."""
    where = ""
    with contextlib.suppress(OSError):
        where = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return f"{platform.node()}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def temporary_name(path: Path, suffix: str = "") -> Path:
    """Make a hidden name beside `path` for a file that is being written, by this process of this machine alone.

    suffix: an ending that the writing library wants to see.
    """
    return path.with_name(f".{path.name}.tmp-{machine()}-{os.getpid()}{suffix}")


def remove_leftovers(folder: str | Path) -> list[str]:
    """Delete what killed processes of this machine left under `temporary_name`s in a folder; return their names.

    Files of living processes stay, and those of other machines and containers, which may be in use, for a week.
    """
    ours = re.compile(r"\..+\.tmp-(.+)-(\d+)(\.\w+)?")
    removed = []
    for path in Path(folder).glob(".*.tmp-*"):
        match = ours.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if match is None:
                continue
            # Of this machine: whether the process lives. Of another: whether the file is older than a week.
            if match[1] == machine():
                in_use = _is_another_living_process(int(match[2]))
            else:
                in_use = time.time() - path.stat().st_mtime < _WEEK_S
            if not in_use:
                path.unlink(missing_ok=True)
                removed.append(path.name)
    return removed


def remove_tree(path: Path) -> None:
    """Delete a folder; of a link only the link: what it leads to is the user's."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def read_json(path: str | Path, *keys: str, way_out: str = "") -> dict[str, Any]:
    """Read a JSON object that has the keys. Raises ValueError, with what to do, for anything else; FileNotFoundError if absent."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not an object")
        lacking = [key for key in keys if key not in content]
        if lacking:
            raise ValueError(f"lacks {', '.join(lacking)}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); {way_out or 'restore it, or choose another folder'}"
        ) from error
    return content


def claim_folder(
    folder: str | Path, program: str, known: Callable[[Path], bool] = lambda folder: False
) -> None:
    """Make a folder for a program's output, or re-enter one: new, empty, or this program's by the mark in it.

    known: says whether a folder without a mark is this program's all the same. Raises ValueError for any other, whose
    files would be lost or mixed with ours.
    """
    # A marked folder says whose it is.
    folder = Path(folder)
    mark = folder / MARK_FILE
    if mark.is_file():
        owner = read_json(mark, "program", way_out="choose another folder")["program"]
        if owner != program:
            raise ValueError(
                f"{folder}: holds the output of {owner}, not of {program}; choose another folder"
            )
        return
    # One without a mark must be new or empty, hidden files apart, or look like an older one of this program.
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file; give a folder")
    if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()) and not known(folder):
        raise ValueError(f"{folder}: not empty and not made by {program}; choose another folder")
    write_json(mark, {"program": program})


def claim_file(path: str | Path, mine: Callable[[str], bool]) -> None:
    """Raise ValueError unless a file to write is new, empty, or ours: mine(its first line)."""
    path = Path(path)
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"{path}: no file; choose another name")
    with open(path, "rb") as file:
        first = file.readline(1 << 20).decode(errors="replace").rstrip("\r\n")
    if first and not mine(first):
        raise ValueError(f"{path}: holds something else and would be lost; choose another name")


def is_json_object(line: str) -> bool:
    """Tell whether a line is a JSON object, for `claim_file` of a file with one object per line."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def escaped(name: str) -> str:
    """Write a file's name on one line of a list of columns: backslash, tab and line breaks as \\\\, \\t, \\n, \\r."""
    return name.translate(_ESCAPES)


def printable(name: str) -> str:
    """Write a file's name on one line that any terminal and log can take: bytes that are not UTF-8 as \\udcXX."""
    return escaped(name).encode(errors="backslashreplace").decode()


def unescaped(text: str) -> str:
    """Undo `escaped`."""
    return re.sub(r"\\([\\tnr])", lambda match: _UNESCAPES[match[1]], text)


_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_UNESCAPES = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}


def usual_mode(path: Path) -> None:
    """Give a file the mode that the umask leaves: safetensors makes its files readable by the owner alone."""
    if path.is_file() and not path.is_symlink():
        path.chmod(0o666 & ~_UMASK)


def _is_another_living_process(number: int) -> bool:
    """Tell whether a process lives; False for this one, which has no unfinished file when it looks for leftovers."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write {path} ({len(content):,} bytes): {error.strerror}"
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1))


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file, whole or not at all: what a full disk cut off is taken back, then OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    # One write of all bytes: lines of several programs do not mix.
    try:
        size, data = os.fstat(handle).st_size, (line + "\n").encode(errors="surrogateescape")
        if size and not _ends_with_a_line(path, size):
            data = b"\n" + data  # what another program left half written stays a line of its own
        try:
            written = os.write(handle, data)
            if written < len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def _ends_with_a_line(path: str | Path, size: int) -> bool:
    with open(path, "rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: str | Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
