"""Commit of a finished directory: its name leads to the old or the new content, also after a kill.

``rename`` cannot replace a directory that has files. Two renames leave a moment without the name,
and a process that is killed then leaves it missing. Linux and macOS can exchange two names.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from skillnet_files.temporary import (
    remove_leftovers,
    replaced_directory,
    restore_replaced,
    temporary_directory,
)

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


@contextlib.contextmanager
def make_scratch_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Provide an empty directory beside ``path`` that is removed when the block ends.

    Leftovers of killed processes are removed first.

    Args:
        path: path that :func:`commit_directory` may give to the directory.

    Raises:
        OSError: the directory cannot be created.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    restore_replaced(target)
    remove_leftovers(target.parent, target.name)
    with temporary_directory(target) as aside:
        yield aside


def commit_directory(tmp: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Rename the finished directory ``tmp`` to ``final`` and replace an existing directory.

    The files are synced to the disk before the rename. Both must be on one file system. The name
    ``final`` always leads to the old or the new directory. On file systems without an exchange of
    names, such as NFS, it is missing for a moment; after a kill in this moment the next commit
    restores the old directory.
    """
    source, target = Path(tmp), Path(final)
    # The rename may reach the disk before the content does, unless this is synced first.
    for folder, _, names in os.walk(source):
        for name in names:
            _sync_file(Path(folder) / name)
        sync_directory(Path(folder))
    # A kill between the two renames left only the old directory, which comes back first.
    restore_replaced(target)
    # A rename cannot replace a directory that has files.
    if not target.exists():
        source.rename(target)
    elif exchange_paths(source, target):
        # The old directory is removed once the new one is sure to have its name.
        sync_directory(target.parent)
        shutil.rmtree(source, ignore_errors=True)
    else:
        with replaced_directory(target):
            source.rename(target)
            sync_directory(target.parent)
    sync_directory(target.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Write the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
