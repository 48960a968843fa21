"""Programs in forked processes that are killed from outside, or by themselves before a file operation."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def start(
    program: str, settings: list[str], folder: Path, kill_before: int = 0, launch: str = ""
) -> tuple[int, int]:
    """Fork a child that runs the program; (its id, a pipe on which it tells of the file operations).

    kill_before: the child kills itself before this one of its file operations; 0: it does not. launch: a file of
    configs/accelerate; the child becomes its launcher, of two processes.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 1
    try:
        os.setpgid(0, 0)  # a group of its own, for signals to groups
        os.close(reading)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if launch:
            become_launcher(launch, program, settings)
        count_operations(folder, writing, kill_before)
        from importlib import import_module

        code = import_module(program if "." in program else f"pipelines.{program}").main(settings) or 0
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def become_launcher(launch: str, program: str, settings: list[str]) -> None:
    """exec `accelerate launch` with two processes, from a folder that is not the repository's."""
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    file, launcher = root / f"configs/accelerate/{launch}.yaml", Path(sys.executable).with_name("accelerate")
    command = [launcher, "launch", "--config_file", file, "--num_processes", "2", "--main_process_port", port]
    os.environ["PYTHONPATH"] = str(root)
    os.execv(launcher, [*map(str, command), "-m", f"pipelines.{program}", *settings])


def family(process: int) -> list[int]:
    """A process and all that descend from it; those of a launcher have groups of their own."""
    found = [process]
    for one in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def count_operations(folder: Path, pipe: int, kill_before: int) -> None:
    """Tell the parent of each operation that changes files of the folder, before it is done."""
    root, count = str(folder), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = arguments
            if not ((isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & os.O_CREAT):
                return
        elif event not in CHANGES:
            return
        path = arguments[0]
        name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        # names that are not absolute are those of a folder which shutil.rmtree is deleting
        if isinstance(name, str) and name and (name.startswith(root) or not name.startswith("/")):
            count += 1
            shown = re.sub(
                r"\.tmp-[^/]*", ".tmp", name.removeprefix(root).lstrip("/")
            )  # no names of machines
            os.write(pipe, f"{event} {shown or '.'}\n".encode())
            if count == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def wait(
    child: int,
    pipe: int,
    kill: Callable[[], bool] = lambda: False,
    number: int = signal.SIGKILL,
    aim: Callable[[list[int]], list[int]] | None = None,
) -> tuple[bool, list[str]]:
    """Until the child ends; (was it stopped, its file operations). kill(): asked every millisecond. Fails on an error.

    number: the signal for the child's whole group; one that it may handle must end it with 128 + number, or be too late.
    aim: of a launcher: who of its family gets the signal; it must then end with an error, and the others before it returns.
    """
    os.set_blocking(pipe, False)
    others: list[int] = []
    said, done, status, asked = b"", False, 0, False
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and not asked and kill():
            asked = True
            others = family(child) if aim else []
            for one in aim(others) if aim else [-child]:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(one, number)
        while chunk := read(pipe):
            said += chunk
        if not done:
            time.sleep(0.001)
    os.close(pipe)
    limit = time.monotonic() + 120
    while any(Path(f"/proc/{one}").exists() for one in others if one != child):
        if time.monotonic() > limit:
            raise RuntimeError(f"processes of a launch are left: {others}")
        time.sleep(0.01)
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) - 128
    killed = ended in (number, signal.SIGKILL)  # an audit hook kills with the latter
    killed |= bool(aim and asked and status)
    if not killed and status:
        raise RuntimeError(f"a start ended with status {status}")
    return killed, said.decode().splitlines()


def in_child(function: Callable[[], list[str]]) -> list[str]:
    """function() in a process of its own: this one stays free of tensor operations."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return json.loads(pipe.read())


def read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 65536)
    except BlockingIOError:
        return b""
