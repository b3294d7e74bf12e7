"""User-facing errors and exit codes of commands and recipes."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from blip.errors import DataError, Stopped
from blip.files import not_permitted

SOME_FAILED, WRONG_USE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
"""Exit statuses: the work could not be done, or not for all of the input; options, files or settings do not fit; and
what a shell reports of a program that SIGINT or SIGPIPE ended."""


def run(main: Callable[[], int | None], *, also: type[Exception] = DataError) -> int:
    """Run a program; print user errors, and those of the classes `also`, as one line without a traceback.

    Returns its status, or raises SystemExit with that of what stopped it.
    """
    try:
        return main() or 0
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader, `head` say, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(PIPE_CLOSED) from None
    except (DataError, ValueError, OSError, also) as error:
        fail(one_line(error), WRONG_USE)
    except Stopped as error:
        fail(one_line(error), SOME_FAILED)


def leave(main: Callable[[], int | None]) -> NoReturn:
    """Run a program and end the process with its status, and nothing that libraries do afterwards can change that.

    What Python does at its end is done: threads are waited for, and what is registered with `atexit` is called. What
    C++ libraries do when they are unloaded is not: under load one of them has aborted after all was said.
    """
    try:
        status = main() or 0
    except SystemExit as stop:
        status = stop.code
        if status is not None and not isinstance(status, int):
            sys.stderr.write(f"{status}\n")
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads on
            stream.flush()
    os._exit(status or 0)


def fail(message: str, status: int) -> NoReturn:
    """Print one line on stderr and end the process."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(status)


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks; of a file that may not be used, whose it is."""
    if isinstance(error, PermissionError):
        return not_permitted(error)
    return re.sub(r":?\s*\n\s*", ": ", str(error).strip()) or type(error).__name__
