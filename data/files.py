"""Files that are whole or absent, and their digests. Used by every room; nothing here knows about videos."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write {path} ({len(content):,} bytes): {error.strerror}"
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1))


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
