"""Panics of Rust libraries (safetensors, tokenizers, resvg) as ordinary errors.

pyo3 raises a panic as ``PanicException``, which is a BaseException and no Exception: no handler of
damaged files catches it, and its message names no file. Every call into such a library that reads
foreign bytes is inside :func:`panics_as_errors`.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def panics_as_errors(problem: str) -> Iterator[None]:
    """Turn a panic inside the block into ValueError; other exceptions pass.

    Args:
        problem: start of the message, such as the path and what is wrong with the file.

    Raises:
        ValueError: the library panicked.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        # The class is not importable: each library has its own, created by pyo3.
        if type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise ValueError(f"{problem} (the library failed: {reason})") from None
