"""Atomic exchange of two directories: at no moment is one of the two names missing.

``rename`` cannot replace a directory that has files. Two renames leave a moment without the name,
and a process that is killed then leaves it missing.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2
#: Answers of a kernel or file system that has no exchange, such as NFS.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def exchange_paths(one: Path, other: Path) -> bool:
    """Exchange two paths of one file system in one step.

    Args:
        one: an existing path.
        other: an existing path.

    Returns:
        Whether they were exchanged; False if the system or the file system cannot do it.

    Raises:
        OSError: a path is missing or cannot be renamed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        result = library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        result = library.renamex_np(first, second, _RENAME_SWAP)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))
