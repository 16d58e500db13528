"""Locks between hosts: leases in an object store, or on a disk that several hosts share.

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
import json
import os
import re
import secrets
import signal
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import location
from skillnet_platform.storage.location import Location, join_location
from skillnet_platform.storage.locks import LockHeldError, describe_holder, make_holder
from skillnet_platform.storage.retry import StoreUnavailableError

#: Seconds between two beats of a holder, and between two looks of a watcher.
BEAT_S, LOOK_S = 10.0, 1.0
#: Seconds without a beat after which a holder counts as gone.
LEASE_S = 60.0
_POLL_S = 0.05
_NAME = re.compile(r"([0-9]{8})\.json")
#: Name of the folder of a lease in the folder that it protects.
LEASE = ".lease"

#: File systems that one host has for itself; leases would only cost time there.
_OWN_DISKS = (
    *("9p", "apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "fuseblk", "jfs"),
    *("overlay", "ramfs", "reiserfs", "rootfs", "squashfs", "tmpfs", "ufs", "xfs", "zfs"),
)
#: Folders of leases that this process holds.
_HELD: set[str] = set()


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
        self._record = make_holder() | _identify_process() | {"token": secrets.token_hex(16)}
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
            is_gone = found is None or _has_died(found.record())
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
            sleep(_POLL_S)  # NFS may show an old listing for a while
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
    if str(folder) in _HELD:
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
    _HELD.add(str(folder))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        _HELD.discard(str(folder))
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


def _identify_process() -> dict[str, Any]:
    """Return what tells processes of one kernel and one process table apart; empty elsewhere."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        system = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        return {"system": system, "started": _start_of(os.getpid())}
    return {}


def _start_of(pid: int) -> str | None:
    """Return when a process started, in ticks of the kernel; None if there is none."""
    with contextlib.suppress(OSError, IndexError):
        about = Path(f"/proc/{pid:d}/stat").read_text(encoding="utf-8", errors="replace")
        return about.rpartition(")")[2].split()[19]
    return None


def _has_died(holder: dict[str, Any]) -> bool | None:
    """Return whether a holder on this system is dead; None if it is elsewhere."""
    system, pid = holder.get("system"), holder.get("pid")
    if system is None or not isinstance(pid, int) or system != _identify_process().get("system"):
        return None
    return _start_of(pid) != holder.get("started")
