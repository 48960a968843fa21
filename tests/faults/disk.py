"""A disk that is really full: a small tmpfs in a mount namespace of a child process, so that the kernel says ENOSPC."""

import ctypes
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000


def own_mounts() -> bool:
    """Give this process mounts of its own; False where the system forbids it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if user and libc.unshare(_NEW_USER | _NEW_MOUNTS) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    elif user or libc.unshare(_NEW_MOUNTS) != 0:
        return False
    private = ["mount", "--make-rprivate", "/"]
    return subprocess.run(private, capture_output=True).returncode == 0


def on_small_disk(folder: Path, size: int, work: Callable[[], Any]) -> Any:
    """work() in a child in which `folder` is an empty disk of `size` bytes; its result, which must be JSON.

    The test is listed as not run where mounts are not permitted. What work() printed is in folder.log beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        result: dict[str, Any] = {"skip": "mounts are not permitted here"}
        try:
            talk_to(folder.with_name(f"{folder.name}.log"))
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
            if own_mounts() and subprocess.run(mount, capture_output=True).returncode == 0:
                result = {"value": work()}
        except BaseException:
            result = {"error": traceback.format_exc()}
        finally:
            os.write(writing, json.dumps(result).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = json.loads(pipe.read())
    os.waitpid(child, 0)
    if "skip" in result:
        pytest.skip(f"not run: {result['skip']}")
    assert "error" not in result, result["error"]
    return result["value"]


def talk_to(log: Path) -> None:
    """Output and log messages of this process go to a file, not to pytest."""
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    logging.getLogger().handlers.clear()


def program(main: Callable[[list[str]], int], *settings: str) -> int:
    """Exit code of a program as its command line ends it."""
    from data.core.cli import run

    try:
        run(lambda: main(list(settings)))
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError("run() ends with SystemExit")


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves `leave` bytes of the disk free."""
    filler = folder / "filler"
    filler.write_bytes(b"")
    free = os.statvfs(folder)
    filler.write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - leave))
    return filler
