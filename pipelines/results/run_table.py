"""The state of a table's commands, and running those that are missing: each once, with a log and a lock of its own.

<out>/steps/NAME.json   what was started when, and how it ended      <out>/steps/NAME.log   what it printed
The lock on NAME.lock is held as long as the command lives, also if the table itself is killed: two tables may run at once.
"""

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from data.core.cli import run
from data.core.files import write_json
from eval.weights import find_weights
from pipelines.results.records import PROGRAMS, Command, Record, find, judges_of
from pipelines.results.tables import ROOT, Places, Row, Table
from pipelines.training.folder import STOPS, Stopped, stop_on_signal
from vae.registry import FAMILIES

log = logging.getLogger(__name__)


@dataclass
class State:
    """A command now. word: done, running, partly, failed, missing, other or not run; reason: of all but done.

    lacking: what the user must bring, in a few words -> where it belongs and comes from.
    """

    word: str
    reason: str
    found: Record
    lacking: dict[str, str] = field(default_factory=dict)


class Desk:
    """What is known about every command of an output folder."""

    def __init__(self, places: Places):
        self.places = places
        self._states: dict[str, State] = {}

    def file(self, command: Command, ending: str) -> Path:
        """The command's journal (.json), log (.log) or lock (.lock)."""
        return Path(self.places.out) / "steps" / f"{command.name.replace('/', '-')}{ending}"

    def write(self, command: Command, content: dict[str, Any]) -> None:
        """Replace the command's journal."""
        write_json(self.file(command, ".json"), content)
        self._states.pop(command.name, None)

    def lock(self, command: Command) -> int | None:
        """The descriptor of the command's lock, for the caller to close; None when another process holds it."""
        file = self.file(command, ".lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def state(self, command: Command) -> State:
        """Read once; a change of the command's journal makes it be read again."""
        if command.name not in self._states:
            self._states[command.name] = self._read_state(command)
        return self._states[command.name]

    def _read_state(self, command: Command) -> State:
        found, journal = find(command), {}
        with contextlib.suppress(OSError, ValueError):  # none for a run folder that was moved here
            journal = json.loads(self.file(command, ".json").read_text())
        # A held lock: the command runs now, here or elsewhere.
        if self.file(command, ".lock").is_file():
            if (handle := self.lock(command)) is None:
                return State("running", found.note or "just started", found)
            os.close(handle)
        # A complete record counts, also of a run that was made by hand.
        if found.state == "done" and journal.get("state", "done") == "done":
            return State("done", "", found)
        if found.state == "other":
            return State("other", f"{command.folder}: {found.note}", found)
        if journal.get("state") == "failed":
            reason = f"{journal.get('reason', '')} (whole output: {self.file(command, '.log')})"
            return State("failed", reason, found)
        # Not done: for lack of data or weights, half way, or not begun.
        if lacking := self._lacking(command):
            return State("missing", "; ".join(lacking.values()), found, lacking)
        if found.state == "partly" or journal:
            return State("partly", found.note or "begun", found)
        return State("not run", "", found)

    def _lacking(self, command: Command) -> dict[str, str]:
        found = {}
        for what, path in command.needs:
            if not (path.is_dir() and any(path.iterdir())):
                found[f"no {what}"] = f"{path}: {where_from(what, path)}"
        for judge in judges_of(command):
            try:
                find_weights(judge, self.places.weights_dir)
            except ValueError as error:
                found[f"no weights: {judge}"] = str(error)
        return found


def where_from(what: str, path: Path) -> str:
    """What to put into a folder that is missing. what: "data: ucf101" or "weights: svd"."""
    kind, name = what.split(": ")
    if kind == "data":
        return f"put the videos of {name} here (docs/datasets.md has the layouts)"
    family = FAMILIES[name]
    if family.convert:
        return f"get {family.source}; convert it: python scripts/convert.py {family.convert} --src FILE --dst {path}"
    return f"get {family.source} and put it here"


def row_state(desk: Desk, table: Table, row: Row) -> tuple[str, str]:
    """(word, reason) of a row: running before failed before missing before partly; done only when all commands are."""
    # The commands by their word, and all that they lack
    commands, found, lacking = table.commands_of(row), {}, {}
    for command in commands:
        state = desk.state(command)
        found.setdefault(state.word, []).append(f"{command.name}: {state.reason}")
        lacking |= state.lacking
    # The most urgent word is the row's.
    for word in ("running", "failed", "other"):
        if hit := found.get(word):
            return word, hit[0] + (f" (and {len(hit) - 1} more)" if len(hit) > 1 else "")
    if lacking:
        return "missing", "; ".join(lacking)
    done = len(found.get("done", ()))
    if done == len(commands):
        return "done", ""
    begun = f"; {found['partly'][0]}" if "partly" in found else ""
    return ("partly" if done or begun else "not run"), f"{done} of {len(commands)} steps{begun}"


def to_get(desk: Desk, table: Table) -> list[str]:
    """What the user must bring before all rows can run: what, where it belongs, where it comes from."""
    found: dict[str, None] = {}
    for command in table.commands.values():
        found |= dict.fromkeys(desk.state(command).lacking.values())
    return list(found)


# ---- running ---------------------------------------------------------------------------------------------


def run_table(desk: Desk, table: Table, launch: str = "") -> int:
    """Run what is missing, row after row; a failed command holds up only what reads from it. Returns how many failed."""
    # In the order of the rows; a command that two rows share runs once.
    queue: dict[str, Command] = {}
    for row in table.rows:
        queue |= {command.name: command for command in table.commands_of(row)}
    failed = 0
    for name, command in queue.items():
        state = desk.state(command)
        if state.word == "done":
            continue
        waiting = [before for before in command.after if desk.state(table.commands[before]).word != "done"]
        if waiting:
            log.info("%s: waits for %s", name, ", ".join(waiting))
        elif state.word == "missing" or (state.word == "other" and not state.found.shared):
            log.info("%s: %s", name, state.reason)
        else:
            failed += not run_command(desk, command, table.warm, launch)
    return failed


def is_parallel(command: Command) -> bool:
    """Whether a command runs on every GPU of --launch: judging does not, and a batch of one clip is one process."""
    programs = ("train_vae", "train_latte", "cache_latents", "sample", "reconstruct")
    return command.program.split(".")[-1] in programs and "global_batch=1" not in command.arguments


def run_command(desk: Desk, command: Command, warm: bool, launch: str = "") -> bool:
    """Run one command; True when it ended well and its record is complete. launch: e.g. "accelerate launch"."""
    # Its lock; another table may hold it for a moment, to look whether the command runs.
    until = time.monotonic() + 2
    while (lock := desk.lock(command)) is None:
        if time.monotonic() > until:
            log.info("%s: running elsewhere", command.name)
            return True
        time.sleep(0.05)
    # Its words; on several GPUs the launcher starts it.
    words = [sys.executable, "-m", command.program, *command.arguments]
    if launch and is_parallel(command):
        words[:1] = shlex.split(launch)
    journal = {"state": "running", "command": words, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        # Run it, with its output in a file.
        desk.write(command, journal)
        log.info("%s: %s", command.name, command.text())
        start, log_file = time.monotonic(), desk.file(command, ".log")
        command.folder.parent.mkdir(parents=True, exist_ok=True)
        code = wait(start_warm if warm else start_process, words, log_file, lock, desk.places)
        journal |= {"state": "done", "code": code, "seconds": round(time.monotonic() - start, 1)}

        # Did it leave what it should?
        found, lines = find(command), log_file.read_text(errors="replace").split("\n")
        if code:
            last = next((line for line in reversed(lines) if line), "")
            journal |= {"state": "failed", "reason": f"exit code {code}: {last[:300]}"}
        elif found.state != "done":
            journal |= {"state": "failed", "reason": f"ended well, but: {found.note or 'no record'}"}
        desk.write(command, journal)
    finally:
        os.close(lock)
    if journal["state"] == "failed":
        log.warning("%s failed: %s", command.name, journal["reason"])
    return journal["state"] == "done"


Started = tuple[int, Callable[[], int | None]]  # process number; what returns its exit code once it has ended


def wait(start: Callable[..., Started], words: list[str], log_file: Path, lock: int, places: Places) -> int:
    """Start a command and wait for its end; returns its exit code.

    A signal that asks this program to stop goes to the command too, which saves; then, as when a signal ended the
    command, Stopped is raised: the table ends with it.
    """
    env = {**os.environ, "OMNILATTE_WEIGHTS": places.weights_dir}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log_file, "ab") as output, stop_on_signal() as stopping:
        number, exit_code = start(words, env, output.fileno(), lock)
        # A signal to the table is passed on once: the command saves and ends.
        told = 0
        while (code := exit_code()) is None:
            if (asked := stopping()) and not told:
                told = asked
                os.kill(number, asked)
            time.sleep(0.02)
    # By a signal, its own or one that was passed on: then the table ends too.
    ended_by = told or (-code if code < 0 else code - 128)
    if ended_by in STOPS:
        raise Stopped(ended_by)
    return code


def start_process(words: list[str], env: dict[str, str], output: int, lock: int) -> Started:
    """A command in a process of its own."""
    streams = {"stdout": output, "stderr": subprocess.STDOUT}
    child = subprocess.Popen(words, **streams, cwd=ROOT, env=env, pass_fds=[lock])
    return child.pid, child.poll


def start_warm(words: list[str], env: dict[str, str], output: int, lock: int) -> Started:
    """The same for commands of a second: forked from a process that has imported the libraries, which takes longer."""
    context = multiprocessing.get_context("forkserver")
    libraries = ["torch.utils.tensorboard", "accelerate", "timm.utils", "lpips", "scipy.linalg"]
    context.set_forkserver_preload([*libraries, "vae.odvae", "eval.features", "pipelines.video_pipeline"])
    child = context.Process(target=_run_main, args=(words[2], words[3:], env, _Passed(output), _Passed(lock)))
    child.start()
    return child.pid, lambda: child.exitcode


class _Passed:
    """A file descriptor on its way to a warm process, where it is a tuple of what can be detached."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple:
        return tuple, ([DupFd(self.number)],)


def _run_main(program: str, arguments: list[str], env: dict[str, str], output: Any, lock: Any) -> None:
    """`python -m program arguments` in this process, its output in a file. The lock is held until the process ends."""
    handle, _held = output[0].detach(), lock[0].detach()
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = [program, *arguments]
    run(lambda: PROGRAMS[program].main(arguments))
