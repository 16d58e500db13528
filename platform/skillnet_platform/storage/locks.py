"""Locks between processes: kernel locks on files, which end with the process that holds them.

A dead holder needs no clean-up: the kernel frees its lock, on a local disk and on NFS. The file
names the holder for messages only. A thread may take a lock again that it holds, also by another
path of the same file; other threads wait like other processes.

Leases are locks between hosts, in an object store or on a disk that several hosts share:

    <folder>/00000003.json      the holder, rewritten at every beat

A kernel lock ends with its process, but a store has none, and some shared disks keep it on one
host. The holder of a lease therefore renews its file every :data:`BEAT_S`. Another host watches
the file. If the file changes, the holder lives, and the other host is refused. If it stays the
same for :data:`LEASE_S` of the watcher's own clock, the holder is gone. Clocks of hosts are never
compared.

A lease changes hands by the file of the next number, which is written only if it is absent. Of
several hosts that take over the same lease, one can write that file. The highest number holds.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from skillnet_files.commit import WITHOUT_LOCKS, lock_file, unlock_file
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import location
from skillnet_platform.storage.location import Location, join_location
from skillnet_platform.storage.retry import StoreUnavailableError

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


#: Seconds between two beats of a holder, and between two looks of a watcher.
BEAT_S, LOOK_S = 10.0, 1.0
#: Seconds without a beat after which a holder counts as gone.
LEASE_S = 60.0
_LEASE_POLL_S = 0.05
_NAME = re.compile(r"([0-9]{8})\.json")
#: Name of the folder of a lease in the folder that it protects.
LEASE = ".lease"

#: File systems that one host has for itself; leases would only cost time there.
_OWN_DISKS = (
    *("9p", "apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "fuseblk", "jfs"),
    *("overlay", "ramfs", "reiserfs", "rootfs", "squashfs", "tmpfs", "ufs", "xfs", "zfs"),
)
#: Folders of leases that this process holds.
_HELD_LEASES: set[str] = set()


@dataclass(frozen=True)
class _LeaseFile:
    """File of a lease, as it was read."""

    number: int
    content: bytes

    def record(self) -> dict[str, Any]:
        """Return the holder; empty if the file is damaged."""
        with contextlib.suppress(ValueError):
            found = json.loads(self.content)
            return found if isinstance(found, dict) else {}
        return {}


class HostLease:
    """Lease of a folder; :func:`hold_lease` is the way to use it.

    Args:
        folder: path or URI of the lease's files.
        describe: returns the message about another holder.
    """

    def __init__(self, folder: Location, describe: Callable[[str], str]) -> None:
        self.folder, self._describe = folder, describe
        self._record = make_holder() | {
            "process": this_process(),
            "token": secrets.token_hex(16),
        }
        self._beats = self._number = 0

    def acquire(self) -> None:
        """Take the lease; watch another holder first.

        Raises:
            LockHeldError: the holder lives.
            UserError, StoreUnavailableError: the store refuses, or does not answer.
        """
        watched: bytes | None = None
        begin = 0.0
        while True:
            # Only the time between two reads counts: a read may wait for a store, and a watcher
            # may be suspended.
            now = monotonic()
            found = self._read_newest()
            is_gone = found is None or has_ended(str(found.record().get("process")))
            if found is None or is_gone or (watched == found.content and now - begin >= LEASE_S):
                if self._claim(found.number + 1 if found else 1):
                    return
                watched = b""  # another host was faster
            elif watched is None and is_gone is None:
                watched, begin = found.content, monotonic()
                console.print_note(
                    f"{self.folder}: {describe_holder(found.record())} may hold this lease; "
                    f"watching it for up to {LEASE_S:.0f} s"
                )
            elif watched != found.content:
                raise LockHeldError(self._explain(found))
            else:
                sleep(LOOK_S)

    def renew(self) -> None:
        """Show that the holder lives.

        Raises:
            LockHeldError: another host took over, because it saw no beat for :data:`LEASE_S`.
            UserError, StoreUnavailableError: the store refuses, or does not answer.
        """
        newest = self._read_newest()
        if newest is not None and newest.number > self._number:
            self.release()
            raise LockHeldError(
                f"{self._explain(newest)}. It took over, because this host gave no sign of life "
                f"for {LEASE_S:.0f} s"
            )
        self._beats += 1
        location.write_location(self._file(self._number), self._content())

    def release(self) -> None:
        """Remove the file of this holder."""
        location.remove_location(self._file(self._number))
        if isinstance(self.folder, Path):
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _claim(self, number: int) -> bool:
        """Write the file of a number if it is absent; return whether the lease is held now."""
        if not location.write_if_absent(self._file(number), self._content()):
            return False
        self._number = number
        others = [other for other in self._list_numbers() if other != number]
        # This host may have been suspended while others took over.
        if any(other > number for other in others):
            self.release()
            return False
        for other in others:
            location.remove_location(self._file(other))
        return True

    def _content(self) -> bytes:
        return json.dumps(self._record | {"beats": self._beats}).encode()

    def _file(self, number: int) -> Location:
        return join_location(self.folder, f"{number:08d}.json")

    def _list_numbers(self) -> list[int]:
        names = map(_NAME.fullmatch, location.list_location(self.folder))
        return sorted(int(name[1]) for name in names if name)

    def _read_newest(self) -> _LeaseFile | None:
        while numbers := self._list_numbers():
            content = location.read_if_exists(self._file(numbers[-1]))
            # Released between the two requests, or taken over: look again.
            if content is not None:
                return _LeaseFile(numbers[-1], content)
            sleep(_LEASE_POLL_S)  # NFS may show an old listing for a while
        return None

    def _explain(self, other: _LeaseFile) -> str:
        return (
            f"{self._describe(describe_holder(other.record()))}. If that host is gone, the same "
            f"command takes over {LEASE_S:.0f} s after its last sign of life"
        )


@contextlib.contextmanager
def hold_lease(folder: Location, describe: Callable[[str], str]) -> Iterator[None]:
    """Hold the lease of a folder while the block runs, and renew it in a thread.

    If another host takes it over, this process gets SIGTERM, and the block ends in an error. A
    lease that this process holds already is not taken again.

    Args:
        folder: path or URI of the lease's files.
        describe: returns the message about another holder, such as
            ``process 7 on node-1 (skillnet finetune, since 10:30:00)``.

    Raises:
        LockHeldError: another process holds the lease, or took it over.
        UserError, StoreUnavailableError: the store refuses, or does not answer.
    """
    if str(folder) in _HELD_LEASES:
        yield
        return
    lease = HostLease(folder, describe)
    lease.acquire()
    ended = threading.Event()
    problems: list[Exception] = []

    def beat() -> None:
        while not ended.wait(BEAT_S):
            try:
                lease.renew()
                problems.clear()
            except LockHeldError as error:
                problems[:] = [error]
                console.print_warning(str(error))
                # It does nothing if the program has no handler for the signal.
                interrupt_main(signal.SIGTERM)
                return
            except (StoreUnavailableError, UserError, OSError) as error:
                problems[:] = [error]

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    _HELD_LEASES.add(str(folder))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        _HELD_LEASES.discard(str(folder))
        lost = problems[0] if problems else None
        if isinstance(lost, LockHeldError):
            raise lost
        # A store that is away would be waited for, and its lease ends without help.
        if lost is None:
            thread.join()
            with contextlib.suppress(StoreUnavailableError, UserError, OSError):
                lease.release()


def is_shared_disk(path: Path) -> bool:
    """Return whether other hosts may use the disk of a path, such as NFS.

    Args:
        path: it need not exist.
    """
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # not Linux
    longest, kind = -1, "ext4"
    for line in mounts.splitlines():
        fields, _, after = line.partition(" - ")
        # The kernel writes a space in a path as \040.
        point = Path(fields.split()[4].encode().decode("unicode_escape"))
        if path.absolute().is_relative_to(point) and len(point.parts) >= longest:
            longest, kind = len(point.parts), after.split()[0]
    return kind not in _OWN_DISKS


def this_process() -> str:
    """Return the identity of this process among all processes that use one tracker or store.

    It consists of the host name, the kernel's boot, the PID namespace, the process id and the
    start time. Containers can share a host name, and the system reuses process ids.
    """
    return f"{visible_processes()}:{os.getpid()}:{_start_of(os.getpid())}"


def has_ended(process: str) -> bool | None:
    """Return whether a process ended; None if it cannot be seen from here.

    A process of another machine, of another container or from before a restart cannot be seen.

    Args:
        process: from :func:`this_process`.
    """
    where, _, started = process.rpartition(":")
    where, _, pid = where.rpartition(":")
    visible = visible_processes()
    # Without Linux' files of processes the boot and the namespace are empty.
    if where != visible or visible.endswith(":") or not pid.isdigit():
        return None
    return _start_of(int(pid)) != started


def visible_processes() -> str:
    """Return the set of processes in which process ids of this process are valid."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink().name.removeprefix("pid:")
    except OSError:
        boot = namespace = ""
    return f"{socket.gethostname()}:{boot}:{namespace}"


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks of the kernel; "" if there is none."""
    try:
        # The name in parentheses may contain spaces, so the fields are counted after it.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
