"""The state of a table's steps, and running those that are missing, each once, with a log and a lock of its own.

<out>/steps/NAME.json   what was started when, how it ended      <out>/steps/NAME.log   what it printed
A lock on NAME.lock is held while the command lives, also if the table itself is killed: two tables can run at once.
"""

import contextlib
import fcntl
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.core.files import write_json
from pipelines.tables.process import call, spawn
from pipelines.tables.records import Found, find
from pipelines.tables.spec import Places, Row, Step, Table

log = logging.getLogger(__name__)


@dataclass
class State:
    """A step now. word: done, running, partly, failed, missing, other or not run; reason: of all but done.

    short: of a missing one, in a few words for a cell.
    """

    word: str
    reason: str
    found: Found
    short: str = ""


class Desk:
    """The notes on every step of an output folder: locks, journals, logs."""

    def __init__(self, places: Places):
        self.places = places
        self.folder = Path(places.out) / "steps"
        self._states: dict[str, State] = {}

    def log_of(self, step: Step) -> Path:
        """What the command printed, over all its starts."""
        return self.folder / f"{step.name}.log"

    def journal(self, step: Step) -> dict[str, Any]:
        """How the last start ended; {} when there was none, as for a run folder that was moved here."""
        file = self.folder / f"{step.name}.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(file.read_text())
        return {}

    def write(self, step: Step, content: dict[str, Any]) -> None:
        """Replace the step's journal."""
        write_json(self.folder / f"{step.name}.json", content)
        self._states.pop(step.name, None)

    @contextlib.contextmanager
    def lock(self, step: Step, wait_s: float) -> Iterator[int | None]:
        """The descriptor of the held lock, None when another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / f"{step.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        until = time.monotonic() + wait_s
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        yield None
                        return
                    time.sleep(0.05)
            yield handle
        finally:
            os.close(handle)

    def running(self, step: Step) -> bool:
        """Whether another process holds the step's lock."""
        if not (self.folder / f"{step.name}.lock").is_file():
            return False
        with self.lock(step, 0) as held:
            return held is None

    def state(self, step: Step) -> State:
        """Read once; a change of the step's journal makes it be read again."""
        if step.name not in self._states:
            self._states[step.name] = self._look(step)
        return self._states[step.name]

    def _look(self, step: Step) -> State:
        found, journal = find(step), self.journal(step)
        if step.program and self.running(step):
            return State("running", found.note or "just started", found)
        if found.state == "done" and journal.get("state", "done") == "done":
            return State("done", "", found)
        if not step.program:
            kind = step.what if step.what.startswith("weights") else f"data: {step.folder.name}"
            short = f"no {kind.replace('weights ', 'weights: ')}"
            return State("missing", f"{step.folder}: {source_of(step)}", found, short)
        if found.state == "other":
            return State("other", f"{step.folder}: {found.note}", found)
        if journal.get("state") == "failed":
            reason = f"{journal.get('reason', '')} (whole output: {self.log_of(step)})"
            return State("failed", reason, found)
        if missing := missing_judge(step, self.places):
            return State("missing", missing[1], found, f"no weights: {missing[0]}")
        if found.state == "partly" or journal:
            return State("partly", found.note or "begun", found)
        return State("not run", "", found)


def source_of(step: Step) -> str:
    """Where what the user must give comes from."""
    from vae.registry import FAMILIES

    kind, _, name = step.what.partition(" ")
    if kind != "weights" or name not in FAMILIES:
        return f"put there the {step.what}"
    family = FAMILIES[name]
    convert = f", convert it with scripts/convert.py {family.convert} --dst" if family.convert else ", put it"
    return f"get {family.source}{convert} there"


def missing_judge(step: Step, places: Places) -> tuple[str, str] | None:
    """(name, what to get where) of the first judging network whose weights are not there."""
    from eval.weights import find_weights

    for kind in step.judges:
        try:
            find_weights(kind, places.weights_dir)
        except ValueError as error:
            return kind, str(error)
    return None


def row_state(desk: Desk, table: Table, row: Row) -> tuple[str, str]:
    """(word, reason) of a row: running before failed before missing before partly; done only when every step is."""
    states = {s.name: desk.state(s) for s in table.steps_of(row)}
    for word in ("running", "failed", "other"):
        if hit := [f"{n}: {s.reason}" for n, s in states.items() if s.word == word]:
            return word, hit[0] + (f" (and {len(hit) - 1} more)" if len(hit) > 1 else "")
    if lacking := dict.fromkeys(s.short for s in states.values() if s.word == "missing"):
        return "missing", "; ".join(lacking)
    done = sum(s.word == "done" for s in states.values())
    if done == len(states):
        return "done", ""
    begun = next((f"; {n}: {s.reason}" for n, s in states.items() if s.word == "partly"), "")
    return ("partly" if done or begun else "not run"), f"{done} of {len(states)} steps{begun}"


def to_get(desk: Desk, table: Table) -> list[str]:
    """What the user must give before all rows can run: what, where it belongs, where it comes from."""
    states = [desk.state(s) for row in table.rows for s in table.steps_of(row)]
    return list(dict.fromkeys(s.reason for s in states if s.word == "missing"))


def run_table(desk: Desk, table: Table, launch: str = "") -> int:
    """Run what is missing, row after row; a failed step leaves out only what needs it. Returns the number that failed."""
    failed: set[str] = set()
    seen: set[str] = set()
    for row in table.rows:
        for step in table.steps_of(row):
            if step.name in seen:
                continue
            seen.add(step.name)
            state = desk.state(step)
            if state.word == "done":
                continue
            waiting = [n for n in step.after if desk.state(table.steps[n]).word != "done"]
            if waiting or state.word == "missing" or not state.found.again:
                log.info("%s: %s", step.name, f"waits for {', '.join(waiting)}" if waiting else state.reason)
                continue
            if not run_step(desk, step, table.in_process, launch):
                failed.add(step.name)
    return len(failed)


def run_step(desk: Desk, step: Step, in_process: bool, launch: str = "") -> bool:
    """Run one command; True when it ended well and its record is complete. launch: e.g. "accelerate launch"."""
    with desk.lock(step, 2.0) as handle:
        if handle is None:
            log.info("%s: running elsewhere", step.name)
            return True
        words = [sys.executable, "-m", step.program, *step.arguments]
        if launch and step.parallel:
            words[:1] = shlex.split(launch)
        begun = {"command": words, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        desk.write(step, {"state": "running", **begun})
        log.info("%s: %s", step.name, step.command())
        start = time.monotonic()
        step.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(desk.log_of(step), "a") as output:
            work = call if in_process else spawn
            code = work(step, words, output, handle, desk.places)
        seconds = round(time.monotonic() - start, 1)
        last = ([ln for ln in desk.log_of(step).read_text(errors="replace").splitlines() if ln] or [""])[-1]
        found = find(step)
        good = code == 0 and found.state == "done"
        reason = (
            f"exit code {code}: {last[:300]}" if code else f"ended well, but: {found.note or 'no record'}"
        )
        ended = {"state": "done" if good else "failed", "code": code, "seconds": seconds}
        desk.write(step, {**begun, **ended, **({} if good else {"reason": reason})})
    if not good:
        log.warning("%s failed: %s", step.name, reason)
    return good
