"""What ends a program with one line instead of a traceback."""


class Stopped(RuntimeError):
    """A run ended for a reason that its message says in full: what, where, and what to do."""
