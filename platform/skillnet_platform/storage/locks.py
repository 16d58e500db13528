"""Locks between processes: kernel locks on files, which end with the process that holds them.

A dead holder needs no clean-up: the kernel frees its lock, on a local disk and on NFS. The file
names the holder for messages only.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from skillnet_platform import console
from skillnet_platform.errors import UserError

#: Errors of a file system that has no locks, such as some mounts of object stores.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_HELD: set[int] = set()


class LockHeldError(UserError):
    """Another process holds a lock; the message names its process and host."""


@contextlib.contextmanager
def hold_lock(
    path: str | os.PathLike[str],
    describe: Callable[[str], str],
    *,
    wait: bool = False,
) -> Iterator[None]:
    """Hold an exclusive lock while the block runs.

    Args:
        path: of the lock file. It is created with its folder if it is missing, and kept.
        describe: returns the message about another holder, such as ``process 7 on node-1``.
        wait: wait for the other holder and print the message, instead of an error.

    Raises:
        LockHeldError: another process holds the lock.
    """
    descriptor = _acquire(Path(path), describe, wait)
    if descriptor is None:
        yield
        return
    _HELD.add(descriptor)
    try:
        yield
    finally:
        _HELD.discard(descriptor)
        # A child that was forked a moment ago may still have a copy of the descriptor.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def read_lock_holder(path: str | os.PathLike[str]) -> str:
    """Return the holder in a lock file: ``process 7 on node-1 (since 10:30:00)``."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(Path(path).read_text(encoding="utf-8"))
        return f"process {holder['pid']:d} on {holder['host']} (since {holder['since']})"
    return "another process"


def _acquire(path: Path, describe: Callable[[str], str], wait: bool) -> int | None:
    has_waited = False
    while True:
        descriptor = _open_lock_file(path)
        if descriptor is None:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = describe(read_lock_holder(path))
            if not wait:
                os.close(descriptor)
                raise LockHeldError(message) from None
            if not has_waited:
                console.print_note(message)
            has_waited = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            os.close(descriptor)
            if error.errno not in WITHOUT_LOCKS:
                raise
            console.print_warning(
                f"{path}: this file system has no locks ({error.strerror}). Start no second "
                "process for the same work"
            )
            return None
        # The holder before may have removed the file: then its lock protects nothing.
        if _is_same_file(descriptor, path):
            _write_holder(descriptor)
            return descriptor
        os.close(descriptor)


def _open_lock_file(path: Path) -> int | None:
    """Open a lock file; None if it can neither be created nor read, so that nobody can write."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # the holder before removed the folder in between
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                break
            is_file = isinstance(error, FileExistsError)
            reason = os.strerror(errno.ENOTDIR) if is_file else error.strerror
            message = f"{path.parent}: cannot be locked ({reason}); give another folder"
            raise UserError(message) from error
    # The file of another user can be locked without writing to it.
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    return None


def _is_same_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _write_holder(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    # A full disk or a file of another user must not stop the work: the text is for messages.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _close_in_child() -> None:
    """Close the locks of the parent in a forked child, which may outlive the parent."""
    for descriptor in list(_HELD):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)
