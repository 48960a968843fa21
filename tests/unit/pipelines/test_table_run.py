"""Running a table's steps: failures, kills, locks, on a program made for it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pipelines.results.records import PROGRAMS, Command, StandIn, wanted
from pipelines.results.run_table import Desk, is_parallel, row_state, run_table
from pipelines.results.tables import load_table, names
from tests.unit.pipelines.tables import reconstruction, table_of

# Its first call in a folder may fail, stop, or kill itself or the table, until a file `mended` is beside it.
PROGRAM = """
import os, pathlib, sys
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls", "a") as calls:
    calls.write("x")
if not (pathlib.Path(__file__).parent / "mended").exists():
    if how == "fail":
        raise RuntimeError("broken on purpose")
    if how == "stop":
        raise SystemExit(143)
    if how == "die":
        os.kill(os.getpid(), 9)
    if how == "kill":
        os.kill(os.getppid(), 9)
        sys.exit(1)
(folder / "stand_in.json").write_text("{}")
"""


@pytest.fixture
def trial(tmp_path, places, monkeypatch):
    """trial(name, how, after) is a command of a program that behaves as `how` says, and leaves a stand-in's record."""
    (tmp_path / "trial_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    for name in ("trial_program", "prints", "asked", "killed"):
        monkeypatch.setitem(PROGRAMS, name, StandIn(None, lambda argv: None))

    def make(name, how="ok", after=()):
        folder = places.runs / name
        return Command(name, "trial_program", (str(folder), how), folder, after)

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
        step = Command(name, name, (), places.runs / name)
        table = table_of({"a": [step], "b": [trial("second")]})
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
from pipelines.results.records import PROGRAMS, Command, StandIn, wanted
from pipelines.results.run_table import Desk, run_table
from pipelines.results.tables import Column, Places, Row, Table
PROGRAMS["trial_program"] = StandIn(None, lambda argv: None)
places = Places("data", "weights", sys.argv[1])
commands = {n: Command(n, "trial_program", (str(places.runs / n), how), places.runs / n)
            for n, how in (("first", "ok"), ("second", "kill"), ("third", "ok"))}
table = Table("t", "tiny", "", "T", "S", "", [Row("a", {})], [Column("PSNR", "it", "psnr")])
table.commands, table.of_row, table.sources = commands, {"a": list(commands)}, {("a", "it"): list(commands)}
run_table(Desk(places), table)
"""


def test_a_killed_table_goes_on_with_the_step_it_was_in(tmp_path, places, trial):
    done = subprocess.run([sys.executable, "-c", KILLED, places.out], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    table = table_of({"a": [trial("first"), trial("second", "kill"), trial("third")]}, rows=["a"])
    until = time.monotonic() + 20
    while row_state(Desk(places), table, table.rows[0])[0] == "running" and time.monotonic() < until:
        time.sleep(0.05)  # the command outlives the table, and holds its lock as long
    desk = Desk(places)
    assert row_state(desk, table, table.rows[0]) == ("partly", "1 of 3 steps; second: begun")
    (tmp_path / "mended").touch()
    assert run_table(desk, table) == 0
    assert calls(places, "first", "second", "third") == [1, 2, 1]
    assert row_state(desk, table, table.rows[0])[0] == "done"


def test_a_step_in_a_process_of_its_own_gets_the_weights_folder_and_a_log(places, trial, tmp_path):
    (tmp_path / "prints.py").write_text("import os, sys; print(os.environ['OMNILATTE_WEIGHTS']); sys.exit(3)")
    step = Command("p", "prints", (), places.runs / "p")
    table = table_of({"a": [step]}, rows=["a"])
    desk = Desk(places)
    assert run_table(desk, table) == 1
    assert desk.file(step, ".log").read_text().strip() == places.weights_dir
    assert "exit code 3" in desk.state(step).reason


def test_a_command_that_the_system_kills_is_a_failure_of_its_row_only(places, trial):
    table = table_of({"a": [trial("first", "die")], "b": [trial("second")]})
    desk = Desk(places)
    assert run_table(desk, table) == 1
    assert "exit code -9" in desk.state(table.commands["first"]).reason
    assert row_state(desk, table, table.rows[1])[0] == "done"


@pytest.mark.parametrize("name", names())
def test_what_runs_on_several_processes_can_share_its_batch_among_eight(name, places):
    commands = load_table(name, "paper", places).commands.values()
    trainings = [c for c in commands if "pipelines.train" in c.program]
    assert {c.name: wanted(c)["global_batch"] % 8 for c in trainings if is_parallel(c)}.keys() == {
        c.name for c in trainings if not c.name.startswith("speed-")
    }
    assert not [c.name for c in trainings if is_parallel(c) and wanted(c)["global_batch"] % 8]


def test_a_warm_start_is_a_process_with_a_log_an_exit_code_and_the_weights_folder(places):
    good = Command("good", "pipelines.stand_in", ("sd2_1", "block_out_channels=[8,8,8,8]", "norm_num_groups=4", "--out", str(places.runs / "good")), places.runs / "good")  # fmt: skip
    bad = Command("bad", "pipelines.stand_in", ("sd2_1", "colour=3", "--out", str(places.runs / "bad")), places.runs / "bad")  # fmt: skip
    table = table_of({"a": [good], "b": [bad]})
    table.warm = True
    desk = Desk(places)
    assert run_table(desk, table) == 1
    assert row_state(desk, table, table.rows[0])[0] == "done"
    assert "exit code 2: error: sd2_1" in desk.state(bad).reason
    assert "colour" in desk.file(bad, ".log").read_text()


def test_a_step_that_runs_elsewhere_is_seen_and_left_alone(places):
    step = reconstruction(places, "r")
    table = table_of({"a": [step]}, rows=["a"])
    desk, other = Desk(places), Desk(places)
    held = desk.lock(step)
    assert held is not None
    assert row_state(other, table, table.rows[0])[0] == "running"
    assert run_table(other, table) == 0
    assert not step.folder.exists()
    os.close(held)
    assert row_state(Desk(places), table, table.rows[0])[0] == "not run"
