"""Files that are whole or absent, and their digests. Used by every room; nothing here knows about videos."""

import contextlib
import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Any


def temporary_name(path: Path, suffix: str = "") -> Path:
    """A hidden name beside `path` for a file that is being written, by this process of this machine alone.

    suffix: an ending that the writing library wants to see.
    """
    return path.with_name(f".{path.name}.tmp-{platform.node()}-{os.getpid()}{suffix}")


def remove_leftovers(folder: str | Path) -> list[str]:
    """Delete what killed processes of this machine left under `temporary_name`s in a folder; their names.

    Files of living processes and of other machines stay, for they may be in use.
    """
    ours = re.compile(rf"\..+\.tmp-{re.escape(platform.node())}-(\d+)(\.\w+)?")
    removed = []
    for path in Path(folder).glob(".*.tmp-*"):
        match = ours.fullmatch(path.name)
        if match and not _is_another_living_process(int(match[1])):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _is_another_living_process(number: int) -> bool:
    """False for this process itself: it has no unfinished file when it looks for leftovers."""
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
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1))


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file, whole or not at all: what a full disk cut off is taken back, then OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size, data = os.fstat(handle).st_size, (line + "\n").encode(errors="surrogateescape")
        try:
            written = os.write(handle, data)
            if written < len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


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
