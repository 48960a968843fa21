"""Two ways to start a step's command: a process of its own, or its `main` in this process. Both return the exit code."""

import contextlib
import logging
import os
import signal
import subprocess
import traceback
from importlib import import_module
from typing import Any

from pipelines.run import ROOT
from pipelines.tables.spec import Places, Step


def spawn(step: Step, words: list[str], output: Any, lock: int, places: Places) -> int:
    """In a process of its own, which shares the lock: it is held as long as the command lives."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMNILATTE_WEIGHTS": places.weights_dir}
    child = subprocess.Popen(
        words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env, pass_fds=[lock]
    )

    def stop(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGINT)  # the trainers save, then stop
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def call(step: Step, words: list[str], output: Any, lock: int, places: Places) -> int:
    """The program's `main` in this process, with what it prints and logs in its log: for commands of a second."""
    root = logging.getLogger()
    handlers, level, weights = root.handlers[:], root.level, os.environ.get("OMNILATTE_WEIGHTS")
    root.handlers[:] = [logging.StreamHandler(output)]
    root.setLevel(logging.INFO)
    os.environ["OMNILATTE_WEIGHTS"] = places.weights_dir
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return import_module(step.program).main(list(step.arguments)) or 0
    except SystemExit as stop:
        return int(stop.code or 0) if isinstance(stop.code, int | None) else 2
    except Exception:  # whatever it is, the other rows go on; the log has all of it
        output.write(traceback.format_exc())
        return 1
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        if weights is None:
            del os.environ["OMNILATTE_WEIGHTS"]
        else:
            os.environ["OMNILATTE_WEIGHTS"] = weights
