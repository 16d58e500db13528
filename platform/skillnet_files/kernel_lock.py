"""Kernel locks on open files; they end with the process that holds them.

Processes of one host exclude each other, and hosts on most shared disks. The only module that
calls ``flock``.
"""

import errno
import fcntl
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
