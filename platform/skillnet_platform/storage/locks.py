"""Locks between processes: kernel locks on files, which end with the process that holds them.

A dead holder needs no clean-up: the kernel frees its lock, on a local disk and on NFS. The file
names the holder for messages only. A thread may take a lock again that it holds, also by another
path of the same file; other threads wait like other processes.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skillnet_files.kernel_lock import WITHOUT_LOCKS, lock_file, unlock_file
from skillnet_platform import console
from skillnet_platform.errors import UserError

#: Seconds that a process waits for a lock before it names the holder.
QUIET_S = 5.0
_POLL_S = 0.01


class LockHeldError(UserError):
    """Another process holds a lock; the message names its process, host and command."""


@dataclass
class _HeldLock:
    """Lock of a thread of this process; ``depth`` counts how often the thread has taken it."""

    descriptor: int
    file: tuple[int, int]
    thread: int
    depth: int = 1


#: Device and inode of a lock file -> its lock. Several paths may lead to one file.
_HELD: dict[tuple[int, int], _HeldLock] = {}


@contextlib.contextmanager
def hold_lock(
    path: str | os.PathLike[str],
    describe: Callable[[str], str],
    *,
    wait: bool = False,
) -> Iterator[None]:
    """Hold an exclusive lock while the block runs.

    Args:
        path: location of the lock file. It is created with its folder if it is missing, and kept.
        describe: returns the message about another holder, such as
            ``process 7 on node-1 (skillnet finetune, since 10:30:00)``.
        wait: wait for the other holder instead of an error, and print the message after
            :data:`QUIET_S`.

    Raises:
        LockHeldError: another process holds the lock.
    """
    held = _acquire(Path(path), describe, wait)
    try:
        yield
    finally:
        if held is not None:
            _release(held)


def read_lock_holder(path: str | os.PathLike[str]) -> str:
    """Return the holder in a lock file, with its host, command and start."""
    with contextlib.suppress(OSError, ValueError):
        return describe_holder(json.loads(Path(path).read_text(encoding="utf-8")))
    return "another process"


def make_holder() -> dict[str, Any]:
    """Return this process as the holder of a lock, for messages of others."""
    # The first words of the command line are no secret.
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}


def describe_holder(holder: Mapping[str, Any]) -> str:
    """Return a holder for messages: process, host, command and start.

    Args:
        holder: as of :func:`make_holder`, maybe damaged.
    """
    with contextlib.suppress(ValueError, KeyError, TypeError):
        place = f"process {holder['pid']:d} on {holder['host']}"
        return f"{place} ({holder['command']}, since {holder['since']})"
    return "another process"


def _acquire(path: Path, describe: Callable[[str], str], wait: bool) -> _HeldLock | None:
    while True:
        descriptor = _open_lock_file(path)
        if descriptor is None:
            return None
        about = os.fstat(descriptor)
        file, thread = (about.st_dev, about.st_ino), threading.get_ident()
        held = _HELD.get(file)
        if held is not None and held.thread == thread:
            os.close(descriptor)
            held.depth += 1
            return held
        try:
            _lock(descriptor, lambda: describe(read_lock_holder(path)), wait)
        except BaseException as error:
            os.close(descriptor)
            if not isinstance(error, OSError) or error.errno not in WITHOUT_LOCKS:
                raise
            console.print_warning(
                f"{path}: this file system has no locks ({error.strerror}). Start no second "
                "process for the same work"
            )
            return None
        # The holder before may have removed the file: then its lock protects nothing.
        if _is_same_file(descriptor, path):
            _write_holder(descriptor)
            _HELD[file] = _HeldLock(descriptor, file, thread)
            return _HELD[file]
        os.close(descriptor)


def _lock(descriptor: int, describe: Callable[[], str], wait: bool) -> None:
    """Lock an open file, and wait for another holder if ``wait``."""
    silent_until = time.monotonic() + QUIET_S
    while True:
        if lock_file(descriptor):
            return
        if not wait:
            raise LockHeldError(describe())
        if time.monotonic() >= silent_until:
            console.print_note(describe())
            lock_file(descriptor, wait=True)
            return
        time.sleep(_POLL_S)


def _release(held: _HeldLock) -> None:
    held.depth -= 1
    # A forked child has closed the locks of its parent.
    if held.depth or _HELD.get(held.file) is not held:
        return
    del _HELD[held.file]
    # A child that was forked a moment ago may still have a copy of the descriptor.
    with contextlib.suppress(OSError):
        unlock_file(held.descriptor)
    os.close(held.descriptor)


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
    # A full disk or a file of another user must not stop the work: the text is for messages.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(make_holder()).encode(), 0)


def _close_in_child() -> None:
    """Close the locks of the parent in a forked child, which may outlive the parent."""
    for held in _HELD.values():
        with contextlib.suppress(OSError):
            os.close(held.descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)
