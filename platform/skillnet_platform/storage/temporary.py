"""Temporary files and directories of atomic writes, and removal of those that a kill left behind.

A temporary path is ``.NAME.sn-TOKEN.tmp`` beside its final path. Its writer holds a kernel lock on
it, so a path without a lock has no living writer, on this machine or on another one that shares
the disk. Each process looks once into every folder that it writes to.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

#: Age in seconds at which a leftover is removed if the file system has no locks.
LEFTOVER_AGE_S = 24 * 3600.0
#: No other program uses such names, so nothing of a user is removed.
_NAME = re.compile(r"\.(?P<final>.+)\.sn-[0-9a-f]{16}\.tmp")
_SWEPT: set[tuple[int, str]] = set()


def temporary_file(final: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Path]:
    """Create an empty file beside ``final``, and remove it at the end unless it was renamed.

    Args:
        final: path that the caller renames the file to.

    Raises:
        OSError: the file cannot be created.
    """
    return _held(Path(final), is_directory=False)


def temporary_directory(final: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Path]:
    """Create an empty directory beside ``final``, and remove it at the end unless it was renamed.

    Args:
        final: path that the caller renames the directory to.

    Raises:
        OSError: the directory cannot be created.
    """
    return _held(Path(final), is_directory=True)


def is_temporary(path: Path) -> bool:
    """Return whether a path has the name of a temporary file or directory of this module.

    Args:
        path: it need not exist.
    """
    return _NAME.fullmatch(path.name) is not None


def remove_leftovers(folder: str | os.PathLike[str], name: str | None = None) -> list[Path]:
    """Remove temporary files and directories whose writer is dead; return their paths.

    Args:
        folder: that contains them.
        name: of their final path; None removes those of all names.
    """
    removed = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is not None and name in (None, match["final"]):
                path = Path(entry.path)
                # The entry of another user, or one that vanished, is left alone.
                with contextlib.suppress(OSError):
                    if _remove_unlocked(path):
                        removed.append(path)
    return removed


@contextlib.contextmanager
def _held(final: Path, is_directory: bool) -> Iterator[Path]:
    # A forked process shares the set, but not the folders that it writes to later.
    key = (os.getpid(), str(final.parent))
    if key not in _SWEPT:
        _SWEPT.add(key)
        remove_leftovers(final.parent)
    path, descriptor = _create(final, is_directory)
    try:
        yield path
    finally:
        if is_directory:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _create(final: Path, is_directory: bool) -> tuple[Path, int]:
    while True:
        path = final.with_name(f".{final.name}.sn-{secrets.token_hex(8)}.tmp")
        if is_directory:
            path.mkdir()
            flags = os.O_RDONLY | os.O_DIRECTORY
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # removed as a leftover before it was locked
        # A shared lock needs no write access, which NFS requires for an exclusive one. Some file
        # systems have no locks: there the age decides.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return path, descriptor
        os.close(descriptor)


def _remove_unlocked(path: Path) -> bool:
    about = path.lstat()
    is_directory = stat.S_ISDIR(about.st_mode)
    if not is_directory and not stat.S_ISREG(about.st_mode):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        is_locked = error.errno in (errno.EAGAIN, errno.EACCES)
        if is_locked or time.time() - about.st_mtime < LEFTOVER_AGE_S:
            os.close(descriptor)
            return False
    # The lock is held until the path is gone: a writer that was just about to lock it then sees
    # that it must create another one.
    if is_directory:
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    os.close(descriptor)
    return True
