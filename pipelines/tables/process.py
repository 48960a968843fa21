"""Two ways to start a step's command: a process of its own, or its `main` in this process. Both return the exit code."""

import contextlib
import logging
import os
import subprocess
import time
import traceback
from importlib import import_module
from typing import Any

from pipelines.tables.spec import Places, Step
from pipelines.training.folder import ROOT, STOPS, Stopped, stop_on_signal


def spawn(step: Step, words: list[str], output: Any, lock: int, places: Places) -> int:
    """In a process of its own, which shares the lock: it is held as long as the command lives."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMNILATTE_WEIGHTS": places.weights_dir}
    child = subprocess.Popen(
        words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env, pass_fds=[lock]
    )

    # what asks this program to stop is for the command too: the trainers save, then end with 128 + the signal
    with stop_on_signal() as stopping:
        told = 0
        while (code := child.poll()) is None:
            if (number := stopping()) and not told:
                told = number
                child.send_signal(number)
            time.sleep(0.05)
    return stop_or_code(code, told)


def stop_or_code(code: int, told: int = 0) -> int:
    """The exit code of a command; Stopped if a signal ended it or was meant for this program: the table ends too."""
    number = told or (-code if code < 0 else code - 128)
    if number in STOPS:
        raise Stopped(number)
    return code


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
        return stop_or_code(int(stop.code or 0)) if isinstance(stop.code, int | None) else 2
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
