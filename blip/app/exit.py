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
"""Exit statuses: the work failed for some or all of the input; invalid options, files or settings; and a shell's
statuses of programs ended by SIGINT and SIGPIPE."""


def run(main: Callable[[], int | None], *, also: type[Exception] = DataError) -> int:
    """Run a program; print user errors, including those of class `also`, as one line without a traceback.

    Returns its status, or raises SystemExit with the status of the error or signal.
    """
    try:
        return main() or 0
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(PIPE_CLOSED) from None
    except (DataError, ValueError, OSError, also) as error:
        fail(one_line(error), WRONG_USE)
    except Stopped as error:
        fail(one_line(error), SOME_FAILED)


def leave(main: Callable[[], int | None]) -> NoReturn:
    """Run a program and end the process with its status, whatever libraries do on unloading.

    Python's own shutdown steps are done: threads are joined and `atexit` functions called. Destructors of C++ libraries
    are skipped: under load one of them has aborted after all output was written.
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
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or the reader is gone
            stream.flush()
    os._exit(status or 0)


def fail(message: str, status: int) -> NoReturn:
    """Print one line on stderr and end the process."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(status)


def one_line(error: BaseException) -> str:
    """Message of an error without line breaks; for a permission error, also the file's owner."""
    if isinstance(error, PermissionError):
        return not_permitted(error)
    return re.sub(r":?\s*\n\s*", ": ", str(error).strip()) or type(error).__name__
