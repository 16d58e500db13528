"""Which sockets of a process tree others may connect to."""

import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, order=True)
class Listening:
    """A TCP socket that listens, or a UDP socket that takes datagrams from anyone."""

    process: str
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        address = ipaddress.ip_address(self.address)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listening(root: int | None = None) -> set[Listening]:
    """What a process (this one) and all below it listen on now."""
    top = psutil.Process(root)
    family = {process.pid: process for process in [top, *top.children(recursive=True)]}
    found = set()
    # One look at all connections: one for each process takes ten times as long.
    for each in psutil.net_connections("inet"):
        process = family.get(each.pid or 0)
        open_to_all = each.type == socket.SOCK_DGRAM and not each.raddr
        if process and (each.status == psutil.CONN_LISTEN or open_to_all):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                name = " ".join(process.cmdline())[:300] or process.name()
                found.add(Listening(name.strip(), each.laddr.ip, each.laddr.port))
    return found


@contextmanager
def watched(root: int | None = None) -> Iterator[set[Listening]]:
    """Collect all sockets that the process tree listens on during the block."""
    seen: set[Listening] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.update(listening(root))
            done.wait(0.5)  # a look reads the open files of all processes

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.update(listening(root))


def reachable(sockets: set[Listening]) -> list[Listening]:
    """Those of them that another machine could connect to."""
    return sorted(each for each in sockets if not each.is_loopback)
