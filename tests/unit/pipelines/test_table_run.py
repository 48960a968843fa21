"""Running a table's steps: failures, kills, locks, on a program made for it."""

import os
import signal
import subprocess
import sys

import pytest

from pipelines.tables.run import Desk, row_state, run_table
from pipelines.tables.spec import Step
from tests.unit.pipelines.tables import reconstruction, table_of

# Its first call in a folder may fail or kill the process that it runs in, until a file `mended` is there.
PROGRAM = """
import os, pathlib
def main(argv):
    folder = pathlib.Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "calls", "a") as calls:
        calls.write("x")
    if argv[1] == "fail" and not pathlib.Path("mended").exists():
        raise RuntimeError("broken on purpose")
    if argv[1] == "stop" and not pathlib.Path("mended").exists():
        raise SystemExit(143)
    if argv[1] == "kill" and not pathlib.Path("mended").exists():
        os.kill(os.getpid(), 9)
    (folder / "stand_in.json").write_text("{}")
"""


@pytest.fixture
def trial(tmp_path, places, monkeypatch):
    """trial(name, how, after) is a step of a program that behaves as `how` says."""
    (tmp_path / "trial_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.chdir(tmp_path)

    def make(name, how="ok", after=()):
        folder = places.runs / name
        return Step(name, folder, folder, "trial_program", (str(folder), how), after)

    return make


def calls(places, *names):
    files = [places.runs / n / "calls" for n in names]
    return [len(f.read_text()) if f.is_file() else 0 for f in files]


def test_a_failed_row_stops_no_other_and_is_run_again_while_finished_steps_are_not(tmp_path, places, trial):
    table = table_of({"a": [trial("bad", "fail"), trial("waits", after=("bad",))], "b": [trial("good")]})
    desk = Desk(places)
    assert run_table(desk, table) == 1
    word, reason = row_state(desk, table, table.rows[0])
    assert word == "failed"
    assert "broken on purpose" in reason
    assert row_state(desk, table, table.rows[1])[0] == "done"
    assert calls(places, "bad", "waits", "good") == [1, 0, 1]
    (tmp_path / "mended").touch()
    assert run_table(Desk(places), table) == 0
    assert calls(places, "bad", "waits", "good") == [2, 1, 1]
    assert row_state(Desk(places), table, table.rows[0])[0] == "done"


def test_a_step_in_a_process_of_its_own_that_a_signal_ended_ends_the_table(places, trial, tmp_path):
    for name, how in (("asked", "sys.exit(130)"), ("killed", "os.kill(os.getpid(), 15)")):
        (tmp_path / f"{name}.py").write_text(f"import os, sys; {how}")
        step = Step(name, places.runs / name, places.runs / name, name)
        table = table_of({"a": [step], "b": [trial("second")]})
        table.in_process = False
        with pytest.raises(SystemExit) as stopped:
            run_table(Desk(places), table)
        assert stopped.value.code == {"asked": 130, "killed": 143}[name]
        assert calls(places, "second") == [0]


def test_a_step_that_a_signal_ended_ends_the_table_and_is_no_failure(tmp_path, places, trial):
    table = table_of({"a": [trial("first", "stop")], "b": [trial("second")]})
    desk = Desk(places)
    with pytest.raises(SystemExit) as stopped:
        run_table(desk, table)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert calls(places, "first", "second") == [1, 0]
    assert row_state(Desk(places), table, table.rows[0])[0] == "partly"
    (tmp_path / "mended").touch()
    assert run_table(Desk(places), table) == 0
    assert calls(places, "first", "second") == [2, 1]


KILLED = """
import sys
from pipelines.tables.run import Desk, run_table
from pipelines.tables.spec import Column, Places, Row, Step, Table
places = Places("data", "weights", sys.argv[1])
steps = {n: Step(n, places.runs / n, places.runs / n, "trial_program", (str(places.runs / n), how))
         for n, how in (("first", "ok"), ("second", "kill"), ("third", "ok"))}
table = Table("t", "tiny", "", "T", "S", "", [Row("a", {})], [Column("PSNR", "", "psnr")], [], [0], True, steps,
              {("a", "PSNR"): list(steps)})
run_table(Desk(places), table)
"""


def test_a_killed_table_goes_on_with_the_step_it_was_in(tmp_path, places, trial):
    done = subprocess.run([sys.executable, "-c", KILLED, places.out], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    table = table_of({"a": [trial("first"), trial("second", "kill"), trial("third")]}, rows=["a"])
    desk = Desk(places)
    assert row_state(desk, table, table.rows[0]) == ("partly", "1 of 3 steps; second: begun")
    (tmp_path / "mended").touch()
    assert run_table(desk, table) == 0
    assert calls(places, "first", "second", "third") == [1, 2, 1]
    assert row_state(desk, table, table.rows[0])[0] == "done"


def test_a_step_in_a_process_of_its_own_gets_the_weights_folder_and_a_log(places, trial, tmp_path):
    (tmp_path / "prints.py").write_text("import os, sys; print(os.environ['OMNILATTE_WEIGHTS']); sys.exit(3)")
    step = Step("p", places.runs / "p", places.runs / "p", "prints")
    table = table_of({"a": [step]}, rows=["a"])
    table.in_process = False
    desk = Desk(places)
    assert run_table(desk, table) == 1
    assert desk.log_of(step).read_text().strip() == places.weights_dir
    assert "exit code 3" in desk.state(step).reason


def test_a_step_that_runs_elsewhere_is_seen_and_left_alone(places):
    step = reconstruction(places, "r")
    table = table_of({"a": [step]}, rows=["a"])
    desk, other = Desk(places), Desk(places)
    with desk.lock(step, 0) as held:
        assert held is not None
        assert row_state(other, table, table.rows[0])[0] == "running"
        assert run_table(other, table) == 0
        assert not step.folder.exists()
    assert row_state(Desk(places), table, table.rows[0])[0] == "not run"
