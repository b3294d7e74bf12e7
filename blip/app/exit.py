"""How commands and recipes end when something is off that a person can put right: one line, and an exit status."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from typing import NoReturn

from blip.errors import DataError, Stopped
from blip.files import not_permitted

SOME_FAILED, WRONG_USE = 1, 2
"""Exit statuses: the work could not be done, or not for all of the input; options, files or settings do not fit."""


def run(main: Callable[[], None]) -> None:
    """Run a program; what a person can put right is said in a line, not in a traceback."""
    try:
        main()
    except (DataError, ValueError, OSError) as error:
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
    """Say one line on stderr and end the process."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(status)


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks; of a file that may not be used, whose it is."""
    if isinstance(error, PermissionError):
        return not_permitted(error)
    return re.sub(r":?\s*\n\s*", ": ", str(error).strip()) or type(error).__name__


def unknown_option(option: str, options: Iterable[str]) -> str:
    """What to say of an option that is none of `options`; abbreviations are not guessed, but the closest is named."""
    option, options = option.partition("=")[0], sorted(options, key=len)
    closest = [name for name in options if name.startswith(option)] or difflib.get_close_matches(option, options, n=1)
    remedy = f"did you mean {closest[0]}?" if closest else "--help lists them all"
    return f"there is no option {option}; {remedy}"
