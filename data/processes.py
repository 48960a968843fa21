"""Work that may crash or hang, in processes of its own: a decoder that dies takes one of them, never the program.

The processes import no torch and are started afresh, not forked: no lock of a thread and no GPU state is copied. Results
come back through pipes, so /dev/shm is not used. They ignore the signals that a terminal or slurm sends to a whole
group, and end when the program does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from data.decoder import BadVideo

_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_START_S = 300.0  # for a process to import what it needs
_CRASHES = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_CODE = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from data.processes import serve; serve(*map(int, sys.argv[2:]))"


def ignore_group_signals() -> None:
    """Ignore what is sent to the whole group: it is for the program, which then ends its helpers itself."""
    for number in _GROUP:
        signal.signal(number, signal.SIG_IGN)


def serve(handle: int, memory: int) -> None:
    """Run as a process: answer (function, arguments) from the connection `handle` until the program hangs up."""
    # End with the program, not with its terminal; use no more memory than allowed.
    ignore_group_signals()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if memory:
        with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    # Answer (True, result or BadVideo), or (False, words) for a fault that is not the file's.
    connection = Connection(handle)
    connection.send(None)  # ready
    while True:
        try:
            function, args = connection.recv()
            try:
                answer = function(*args)
            except BadVideo as error:
                answer = error
            connection.send((True, answer))
        except (EOFError, ConnectionError):
            return
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}"))


def _end_with(parent: int) -> None:
    """Exit when the program is gone: a process whose program was killed may be stuck in a decoder."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


class _Process:
    """One process and the job it is at (None until it is ready)."""

    def __init__(self, memory: int):
        self.connection, other = Pipe()
        command = [sys.executable, "-c", _CODE, json.dumps(sys.path), str(other.fileno()), str(memory)]
        # blocked from its first instruction on: one that comes before the process can ignore it would end it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP)
        try:
            self.process = subprocess.Popen(command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.close()
        self.job: int | None = None
        self.ready, self.deadline, self.cpu_s, self.timeout_s = False, time.monotonic() + _START_S, 0.0, 0.0

    def give(self, job: int, work: tuple, timeout_s: float) -> None:
        """Hand over a job; its time starts now."""
        self.job, self.deadline, self.cpu_s = job, time.monotonic() + timeout_s, self.used_s()
        self.timeout_s = timeout_s
        with contextlib.suppress(OSError):  # it has ended: seen when the answer is read
            self.connection.send(work)

    def used_s(self) -> float:
        """Return processor seconds so far; infinite where the system does not say."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as file:
                user, system = file.read().rpartition(")")[2].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return float("inf")

    def stop(self, patience_s: float = 0.0) -> int:
        """End it, busy or not, after a while in which it may end by itself; return its exit code."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        self.process.kill()
        return self.process.wait()


class Pool:
    """`submit` jobs, `wait` for their outcomes in any order; a context manager, whose end stops the processes.

    workers: processes, started when needed. timeout_s: for one job, and a second more for each MiB of the file that it is
    about; one that takes longer, or whose process dies, is tried once more in a new process. memory: bytes that a process
    may allocate, 0 for no limit.
    """

    def __init__(self, workers: int, timeout_s: float = 120.0, memory: int = 0):
        if workers < 1:
            raise ValueError(f"workers={workers}: at least one process")
        self.workers, self.timeout_s, self.memory = workers, timeout_s, memory
        # By the jobs' numbers: what to do, which are not handed out yet, which are tried a second time.
        self._work: dict[int, tuple] = {}
        self._waiting: deque[int] = deque()
        self._again: set[int] = set()
        self._processes: list[_Process] = []
        self._number = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._processes:
            process.stop()
        self._processes.clear()

    def submit(self, function: Callable, *args: Any) -> int:
        """Take a job, `function` of a module and arguments that pickle; return its number."""
        self._number += 1
        self._work[self._number] = (function, args)
        self._waiting.append(self._number)
        self._hand_out()
        return self._number

    def in_order(self, jobs: Iterable[tuple], ahead: int) -> Iterator[Any]:
        """Yield outcomes of the jobs (function, *arguments) in their order; at most `ahead` are on their way or wait."""
        asked: deque[int] = deque()
        done: dict[int, Any] = {}
        jobs = iter(jobs)
        while True:
            for job in islice(jobs, ahead - len(asked)):
                asked.append(self.submit(*job))
            if not asked:
                return
            while asked[0] not in done:
                done.update([self.wait()])
            yield done.pop(asked.popleft())

    def _hand_out(self) -> None:
        """Give waiting jobs to idle processes, and start processes for those that are left."""
        idle = [p for p in self._processes if p.ready and p.job is None]
        while self._waiting and idle:
            job = self._waiting.popleft()
            work = self._work[job]
            idle.pop().give(job, work, self.timeout_s + _mebibytes(_about(work[1])))
        starting = sum(not p.ready for p in self._processes)
        while len(self._processes) < self.workers and starting < len(self._waiting):
            self._processes.append(_Process(self.memory))
            starting += 1

    def wait(self) -> tuple[int, Any]:
        """Wait for a job that is done: (number, what the function returned, or the BadVideo that it raised).

        A job that failed twice is a BadVideo too. Raises OSError for any other error in the process.
        """
        while True:
            self._hand_out()
            readable = wait([p.connection for p in self._processes], timeout=0.5)
            for process in list(self._processes):
                # Answers come first: a process that is late and has answered is not late.
                if process.connection in readable:
                    outcome = self._read(process)
                elif process.deadline < time.monotonic() and (process.job is not None or not process.ready):
                    outcome = self._lost(process, late=True)
                else:
                    continue
                if outcome is not None:
                    del self._work[outcome[0]]
                    self._hand_out()
                    return outcome

    def _read(self, process: _Process) -> tuple[int, Any] | None:
        """Read what a process sent: None when it is ready or its job is tried again."""
        try:
            message = process.connection.recv()
        except (EOFError, OSError):
            return self._lost(process, late=False)
        if message is None:
            process.ready = True
            return None
        job, process.job = process.job, None
        good, value = message
        if not good:
            _, args = self._work[job]
            raise OSError(f"{_about(args)}: {value}; a fault of this machine or program, not of the file")
        return job, value

    def _lost(self, process: _Process, late: bool) -> tuple[int, Any] | None:
        """Replace a process that hangs (late) or has died.

        Its job waits again, or is given up with what is known of it.
        """
        self._processes.remove(process)
        used = process.used_s() - process.cpu_s
        code, job = process.stop(0 if late else 5), process.job
        if job is None:
            if process.ready:
                return None
            raise OSError(f"a process for reading did not start (exit code {code}); is there memory left?")
        # The first time it may be the machine, the second time it is the file.
        if job not in self._again:
            self._again.add(job)
            self._waiting.appendleft(job)
            return None
        if late:  # one that was stopped, or whose disk was away, has used no time
            return job, BadVideo(
                f"not decoded within {process.timeout_s:.0f} s", used > process.timeout_s / 8
            )
        return job, BadVideo("the decoder crashed on this file", -code in _CRASHES)


def _about(args: tuple) -> str:
    """Name the file that a job is about, as its first argument says."""
    first = args[0] if args else ""
    first = getattr(first, "record", getattr(first, "video", first))  # of data/table.py, of eval/selection.py
    return str(getattr(first, "path", first))


def _mebibytes(path: str) -> float:
    try:
        return os.stat(path).st_size / (1 << 20)
    except (OSError, ValueError):
        return 0.0
