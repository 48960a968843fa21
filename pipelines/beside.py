"""What happens beside the device's work: copying, judging and writing in threads; and how long the device had to wait."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


class Waits:
    """Which share of the time since its making the program's main thread waited, and for what: the device was idle then.

    str() of it: "12% of the time waiting for videos". Work that was queued before may keep a GPU busy for a part of it.
    """

    def __init__(self) -> None:
        self.began, self.seconds = time.monotonic(), Counter()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Time inside counts as waiting for `what`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - start

    def over(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        """The items; the time until each of them is there counts as waiting for `what`."""
        # The clock runs only while the next item is not there; what the caller does with it is not waiting.
        items = iter(items)
        while True:
            with self.waiting(what):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def __str__(self) -> str:
        passed = max(time.monotonic() - self.began, 1e-9)
        shares = [f"{100 * s / passed:.0f}% of the time waiting for {n}" for n, s in self.seconds.items()]
        return ", ".join(shares) or "no waiting"


class Beside:
    """One thread that does what it is given, in that order. A context manager; its end waits for all that was given.

    ahead: pieces that may be on their way; `do` waits for the oldest of more, so that memory stays bounded. An error in a
    piece ends the program: the next `do` raises it, or the end, and what still waits is not begun. After an error of the
    caller, or Ctrl-C, what was given is still done: it is finished work.
    """

    def __init__(self, waits: Waits, what: str, ahead: int = 4):
        self.waits, self.what, self.ahead = waits, what, ahead
        self._thread = ThreadPoolExecutor(1)
        self._given: deque[Future] = deque()
        self._failed = False

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        # Without an error of the caller: wait for all, so that an error of a piece is raised here.
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._thread.shutdown()

    def do(self, function: Callable[..., Any], *args: Any) -> None:
        """Let the thread call function(*args) after what it was given before. Raises the error of an earlier piece."""
        self._wait(self.ahead - 1)
        self._given.append(self._thread.submit(self._one, function, args))

    def _one(self, function: Callable[..., Any], args: tuple) -> None:
        # After an error nothing more is begun: the next piece might build on what is missing.
        if self._failed:
            return
        try:
            function(*args)
        except BaseException:
            self._failed = True
            raise

    def _wait(self, most: int) -> None:
        # Take what is done off the front; its error, if any, is raised by result().
        while self._given and (len(self._given) > most or self._given[0].done()):
            with self.waits.waiting(self.what):
                self._given[0].result()
            self._given.popleft()
