"""Log lines of a program: whole beside bars, repeated warnings once with a count, dates where there is no terminal."""

import logging
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys
from data.core.cli import run
from data.progress import Progress
log = logging.getLogger("room")
def main():
    for n in range(15):
        log.warning("damaged: %s", f"{n}.mp4")
    for n in range(4):
        log.warning("disk is full")
    log.info("steps %d", 1)
    log.info("steps %d", 1)
    print("result")
run(main)
"""


@pytest.fixture
def lines():
    def go(**env):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=env or None
        )
        assert done.stdout == "result\n"
        return done.stderr.splitlines()

    return go


def test_a_warning_that_repeats_is_shown_once_and_counted(lines):
    text = [line[20:] for line in lines()]
    assert text[:10] == [f"room: warning: damaged: {n}.mp4" for n in range(10)]
    assert text[10:] == [
        "room: warning: disk is full",
        "room: steps 1",
        "room: steps 1",
        "room: warning: 5 more of this kind, the last: damaged: 14.mp4",
        "room: warning: 3 more of this kind, the last: disk is full",
    ]


def test_without_a_terminal_a_line_has_its_date(lines):
    assert all(line[:2] == "20" and line[10] == " " and line[13] == ":" for line in lines())


def test_other_processes_than_the_first_show_warnings_only(lines):
    assert not [line for line in lines(RANK="1") if "steps" in line]


def test_a_log_line_does_not_run_into_a_bar(capsys):
    from tqdm import tqdm

    from data.core.console import Console

    log, console = logging.getLogger("beside a bar"), Console()
    log.addHandler(console)
    log.setLevel(logging.INFO)
    log.propagate = False
    with tqdm(total=3, file=sys.stderr, mininterval=0, ncols=40) as bar:
        bar.update()
        log.info("a line")
        bar.update()
    shown = capsys.readouterr().err
    line = next(part for part in shown.replace("\r", "\n").split("\n") if "a line" in part)
    assert line.endswith("beside a bar: a line")
    assert "%" not in line
    console.close()
