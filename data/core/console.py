"""Log lines on stderr: beside a progress bar, with the date where there is no terminal, and repeated warnings counted."""

import logging
import os
import sys
import time
from pathlib import Path

SHOWN = 10  # warnings of one kind that are printed, each text once; the others are counted


class Console(logging.Handler):
    """One line per event. A warning whose text was there is counted; of one kind the first ten are shown, counts at the end."""

    def __init__(self):
        super().__init__()
        self.terminal = sys.stderr.isatty()
        self.texts: set[tuple[str, str]] = set()
        # Name and text before its values -> [shown, hidden, the last hidden].
        self.kinds: dict[tuple[str, str], list] = {}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            warning = record.levelno >= logging.WARNING
            if not (warning and self._hides(record, text)):
                self._print(record.name, text, warning)
                if record.exc_info:
                    self._print(record.name, logging.Formatter().formatException(record.exc_info))
        except Exception:  # as every handler: a log line never ends a program
            self.handleError(record)

    def _hides(self, record: logging.LogRecord, text: str) -> bool:
        """Tell whether a warning is only counted: a text that was shown, or one of a kind that was shown often enough."""
        kind = self.kinds.setdefault((record.name, str(record.msg)), [0, 0, ""])
        if kind[0] < SHOWN and (record.name, text) not in self.texts:
            self.texts.add((record.name, text))
            kind[0] += 1
            return False
        kind[1:] = kind[1] + 1, text
        return True

    def _print(self, name: str, text: str, warning: bool = False) -> None:
        stamp = time.strftime("%H:%M:%S" if self.terminal else "%Y-%m-%d %H:%M:%S")
        name = Path(sys.argv[0]).stem if name == "__main__" else name
        line = f"{stamp} {name}: {'warning: ' if warning else ''}{text}"
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)  # clears a bar and draws it again below
        else:
            print(line, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        for (name, _), (_, hidden, last) in self.kinds.items():
            if hidden:
                self._print(name, f"{hidden} more of this kind, the last: {last}", True)
        self.kinds = {}
        super().close()


def console() -> None:
    """Show log lines of this program, of other processes than the first only warnings.

    Does nothing where logging is set up.
    """
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, handlers=[Console()])
    for noisy in ("PIL", "matplotlib", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # diffusers 0.42 says this of every model that is cast, although its list of modules is empty
    casts = logging.getLogger("diffusers.models.modeling_utils")
    casts.addFilter(lambda record: "kept in float32: []" not in record.getMessage())
