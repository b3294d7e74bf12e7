"""What ends a program with one line instead of a traceback."""


class Stopped(RuntimeError):
    """A run ended for a reason that its message says in full: what, where, and what to do."""


_FULL = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""What CUDA, PyTorch's allocator of main memory on Linux and on Windows, and cuBLAS say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small, the machine's or a device's."""
    if isinstance(error, RuntimeError) and not isinstance(error, Stopped):
        return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _FULL)
    return isinstance(error, MemoryError)
