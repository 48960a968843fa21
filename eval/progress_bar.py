"""A progress bar on stderr with the time left; silent when stderr is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(total: int, text: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts `n` more videos."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=text, unit="video", file=sys.stderr, disable=not sys.stderr.isatty()
    ) as shown:
        yield lambda n: shown.update(n) and None
