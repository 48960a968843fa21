"""How far a long loop is: a bar at a terminal, elsewhere lines with the time that is left."""

import logging
import time
from collections.abc import Callable

from tqdm import tqdm

log = logging.getLogger(__name__)
KNOWN = 4.0, 20.0  # seconds of work that tell the speed: after the first unit, which may be slow; with it
APART = 30.0, 600.0  # seconds between two lines: at least, and at most
SHARE = 0.05  # of the work between two lines, where it is done in between


def duration(seconds: float) -> str:
    """Say a time as people do: 40 s, 12 min, 5 h, 3 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds > (100 if unit == "min" else 2 * length):
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


class Progress(tqdm):
    """A tqdm bar on stderr. Without a terminal it logs `cache: 40 of 300 shards, about 2 min left`, each 5 % or ten minutes.

    main: False shows nothing (another process does). initial: units done before, in no time of this loop. once: no more lines
    than the first, as soon as the time left is known: the caller has lines of its own. note: words at the end of a line.
    """

    def __init__(
        self,
        total: int,
        desc: str,
        unit: str,
        main: bool = True,
        initial: int = 0,
        once: bool = False,
        note: Callable[[], str] | None = None,
    ):
        super().__init__(total=total, desc=desc, unit=unit, initial=initial, disable=not main or None)
        self.silent, self.once, self.told = not (main and self.disable), once, None
        self.note = note
        self.text, self.noun, self.done, self.wanted = desc, unit, initial, total
        self.marks = [(time.monotonic(), initial)]  # the beginning, and the end of the first unit

    def update(self, n: int = 1) -> None:
        super().update(n)
        self.done += n
        now = time.monotonic()
        if self.silent:
            return
        # The last line, if there was another before it.
        if self.done >= self.wanted:
            if self.told and not self.once:
                took = duration(now - self.marks[0][0])
                log.info("%s: all %d %ss in %s", self.text, self.wanted, self.noun, took)
            self.silent = True
            return
        # A line in between, when enough time or work lies behind the one before.
        if self.told:
            (then, before), (least, most) = self.told, APART
            if now - then > most or (now - then > least and self.done - before > SHARE * self.wanted):
                self._tell(now, *self.marks[-1])
            return
        # The first line, as soon as the speed is known.
        for (then, before), enough in zip(reversed(self.marks), KNOWN[2 - len(self.marks) :], strict=True):
            if now - then > enough:
                self._tell(now, then, before)
                return
        if len(self.marks) == 1:
            self.marks.append((now, self.done))

    def _tell(self, now: float, then: float, before: int) -> None:
        left = (now - then) / (self.done - before) * (self.wanted - self.done)
        note = f", {self.note()}" if self.note else ""
        words = self.text, self.done, self.wanted, self.noun, duration(left), note
        log.info("%s: %d of %d %ss, about %s left%s", *words)
        self.told, self.silent = (now, self.done), self.once
