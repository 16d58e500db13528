"""Allocator settings that keep freed memory in the process: training steps are 20 % faster on CPU.

glibc returns large freed blocks to the system at once and requests them again in the next
operation. Each page then costs a page fault (13,000 to 30,000 per step at width 192, measured).
The peak memory is unchanged: only memory between two peaks is kept.
"""

import ctypes
import gc
import sys
from typing import Any

#: Environment of a process that is not yet started, such as ``worker_runtime_env`` of Ray Train.
#: This is more reliable than :func:`keep_freed_memory`, because a thread keeps its first arena.
KEEP_FREED_MEMORY: dict[str, str] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Apply the settings to this process; call it before threads start.

    Returns:
        Whether the settings were applied. Without glibc (macOS, Windows, musl) nothing happens.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    # One arena: memory that one thread freed serves the next operation of any thread.
    options = {_M_ARENA_MAX: 1, _M_TRIM_THRESHOLD: 2**31 - 1, _M_MMAP_THRESHOLD: 2**30}
    return all(mallopt(option, value) == 1 for option, value in options.items())


def give_back_freed_memory() -> bool:
    """Return free memory to the system, for a process that runs several trainings in sequence.

    Kept memory stays in the arena of the thread that freed it. The next run has other threads and
    arenas, so the process grew by half a gigabyte per run (measured).

    Returns:
        Whether memory was returned.
    """
    # Cycles of the finished run would otherwise keep its tensors.
    gc.collect()
    trim = _of_glibc("malloc_trim")
    return trim is not None and trim(0) == 1


def _of_glibc(name: str) -> Any:
    """Return a function of this process' C library, or None if the library is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
