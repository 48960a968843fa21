"""How every program begins and ends: log lines on stderr; a wrong input is one line on stderr and exit code 2, never a traceback."""

import os
import sys
from collections.abc import Callable

from data.core.console import console
from data.core.environment import check_packages


def run(main: Callable[[], int | None]) -> None:
    """Run a program's `main` and exit: 0 on success, 2 on a user's error (ValueError, OSError) or a package
    that is too old, 130 on Ctrl-C.

    Set OMNILATTE_TRACEBACK=1 to see the whole traceback of such an error.
    """
    console()
    try:
        check_packages()
        sys.exit(main() or 0)
    except (ValueError, OSError) as error:
        if os.environ.get("OMNILATTE_TRACEBACK") == "1":
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
