"""Locks, temporary files and the commit of a finished directory, all of which a kill may cut short.

After a commit the name of a directory leads to the old or the new content, also after a kill.

``rename`` cannot replace a directory that has files. Two renames leave a moment without the name,
and a process that is killed then leaves it missing. Linux and macOS can exchange two names.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

#: Errors of a file system that has no locks, such as some mounts of object stores.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def lock_file(file: int | IO[bytes], *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file, or change the kind of its lock.

    Args:
        file: descriptor or stream.
        shared: several processes may hold a shared lock, and one an exclusive lock.
        wait: wait for other holders.

    Returns:
        Whether the lock is held now; False if another process holds it.

    Raises:
        OSError: the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def unlock_file(file: int | IO[bytes]) -> None:
    """Release the lock of an open file, also for forked processes that share it."""
    fcntl.flock(file, fcntl.LOCK_UN)


#: Age in seconds at which a leftover is removed if the file system has no locks.
LEFTOVER_AGE_S = 24 * 3600.0
#: No other program uses such names, so nothing of a user is removed.
_NAME = re.compile(r"\.(?P<final>.+)\.sn-[0-9a-f]{16}\.tmp")
_REPLACED_NAME = re.compile(r"\.(?P<final>.+)\.sn-[0-9a-f]{16}\.old\.tmp")
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


@contextlib.contextmanager
def replaced_directory(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Move a directory aside while the block replaces it, and remove it at the end.

    After an error it gets its name back. After a kill, :func:`restore_replaced` does that.

    Args:
        final: path of the directory.

    Raises:
        OSError: the directory cannot be moved.
    """
    target = Path(final)
    old = _new_path(target, "old.tmp")
    # The lock stays with the directory under its new name.
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            lock_file(descriptor, shared=True, wait=True)
        target.rename(old)
        try:
            yield old
        except BaseException:
            if not target.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(descriptor)


def restore_replaced(final: str | os.PathLike[str]) -> None:
    """Restore the directory that a killed process moved away, or remove it if it was replaced.

    Args:
        final: path of the directory.
    """
    target = Path(final)
    for left in _paths_of(_REPLACED_NAME, target.parent, target.name):
        # Without locks this is safe too: no directory is removed that has not been replaced.
        with contextlib.suppress(OSError), _claim(left, age_s=0.0) as is_abandoned:
            if is_abandoned and not target.exists():
                left.rename(target)
            elif is_abandoned:
                shutil.rmtree(left, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str], name: str | None = None) -> list[Path]:
    """Remove temporary files and directories whose writer is dead; return their paths.

    Args:
        folder: that contains them.
        name: identifier of their final path; None removes those of all names.
    """
    removed = []
    for path in _paths_of(_NAME, Path(folder), name):
        # The entry of another user, or one that vanished, is left alone.
        with contextlib.suppress(OSError), _claim(path, LEFTOVER_AGE_S) as is_abandoned:
            if is_abandoned:
                _remove(path)
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
        _remove(path)
        os.close(descriptor)


def _new_path(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}.sn-{secrets.token_hex(8)}.{suffix}")


def _create(final: Path, is_directory: bool) -> tuple[Path, int]:
    while True:
        path = _new_path(final, "tmp")
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
            lock_file(descriptor, shared=True, wait=True)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return path, descriptor
        os.close(descriptor)


def _paths_of(pattern: re.Pattern[str], folder: Path, name: str | None) -> list[Path]:
    """Return the paths in a folder that match, of one final name or of all."""
    with contextlib.suppress(OSError):
        matches = ((path, pattern.fullmatch(path.name)) for path in folder.iterdir())
        return [path for path, match in matches if match and name in (None, match["final"])]
    return []


@contextlib.contextmanager
def _claim(path: Path, age_s: float) -> Iterator[bool]:
    """Lock a path for a block; the value is False if its writer lives.

    The lock is held until the path is gone: a writer that was just about to lock it then sees that
    it must create another one.

    Args:
        path: file or directory.
        age_s: age at which it counts as abandoned on a file system without locks.
    """
    about = path.lstat()
    if not stat.S_ISDIR(about.st_mode) and not stat.S_ISREG(about.st_mode):
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        try:
            is_abandoned = lock_file(descriptor)
        except OSError:
            is_abandoned = time.time() - about.st_mtime >= age_s
        yield is_abandoned
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def link_or_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file a second name, or copy it where the file system has no hard links.

    Args:
        source: existing file that nobody writes into.
        target: location that does not exist.
    """
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


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
