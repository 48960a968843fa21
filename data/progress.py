"""How far a long loop is: a bar at a terminal, elsewhere one line as soon as the time left is known."""

import logging
import time

from tqdm import tqdm

log = logging.getLogger(__name__)
KNOWN = 4.0, 20.0  # seconds of work that tell the speed: after the first unit, which may be slow; with it


class Progress(tqdm):
    """A tqdm bar on stderr. Without a terminal it logs `stage one: 40 of 300 steps, about 2 min left`, once.

    main: False shows nothing (another process does). initial: units done before, in no time of this loop.
    """

    def __init__(self, total: int, desc: str, unit: str, main: bool = True, initial: int = 0):
        super().__init__(total=total, desc=desc, unit=unit, initial=initial, disable=not main or None)
        self.told = not (main and self.disable)
        self.text, self.noun, self.done, self.wanted = desc, unit, initial, total
        self.marks = [(time.monotonic(), initial)]  # the beginning, and the end of the first unit

    def update(self, n: int = 1) -> None:
        super().update(n)
        self.done += n
        if self.told or self.done >= self.wanted:
            return
        now = time.monotonic()
        for (then, before), enough in zip(reversed(self.marks), KNOWN[2 - len(self.marks) :], strict=True):
            if now - then > enough:
                left = (now - then) / (self.done - before) * (self.wanted - self.done)
                shown = f"{left / 60:.0f} min" if left > 100 else f"{left:.0f} s"
                log.info(
                    "%s: %d of %d %ss, about %s left", self.text, self.done, self.wanted, self.noun, shown
                )
                self.told = True
                return
        if len(self.marks) == 1:
            self.marks.append((now, self.done))
