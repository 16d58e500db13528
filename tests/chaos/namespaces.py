"""Linux namespaces that stand for hosts, and the bridge and cables between them.

Each lives as long as its first process, which waits for the end of a pipe that its maker holds. So
everything (processes, mounts, interfaces) ends with the maker, however that ends.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts")
PREFIX = "10.77.0."
#: Where programs are looked for: some distributions leave sbin out of a user's PATH.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

#: Of the namespaces that hold a bridge, which stands for the cable between hosts.
BRIDGE = "ip link add lab type bridge; ip link set lab up; ip link set lo up"

#: What a host is made of, at once and for a moment: an own file system, a bridge, a cable.
TRIED = """
mount -t tmpfs none /mnt
ip link add lab type bridge
ip link add one type veth peer name other
"""

#: Waits for the end of its input. A shell, because the first process must reap what others leave.
KEEP = "echo ready; cat >/dev/null; :"


@functools.cache
def missing(*programs: str) -> str:
    """Why hosts cannot be built here; empty if they can.

    It makes one for a moment: ask when a test is run, not when it is collected.

    Args:
        programs: that hosts need beside those of namespaces.
    """
    if sys.platform != "linux":
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "making namespaces needs root"
    needed = {"ip", "unshare", "nsenter", *programs}
    absent = sorted(name for name in needed if shutil.which(name, path=SEARCH) is None)
    if absent:
        return f"not installed: {', '.join(absent)} (openssh-server, rsync, iproute2, curl, procps)"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "bash", "-euc", TRIED],
        env={**os.environ, "PATH": SEARCH},
        capture_output=True,
        text=True,
    )
    return f"hosts cannot be made here: {tried.stderr.strip()}" if tried.returncode else ""


class Namespaces:
    """A set of new namespaces, inside those of another set or of this process."""

    def __init__(self, script: str, outer: "Namespaces | None" = None, **environment: str) -> None:
        enter = outer.enter() if outer else []
        new = [*NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        self._holder = subprocess.Popen(
            [*enter, "unshare", *new, "bash", "-euc", f"{script}\n{KEEP}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PATH": SEARCH, **environment},
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError("a namespace could not be set up; its message is above")
        below = psutil.Process(self._holder.pid).children(recursive=True)
        self.pid = next(each.pid for each in below if each.name() == "bash")

    def enter(self) -> list[str]:
        """Words before a command that is to run inside."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--"]

    def close(self) -> None:
        """End the first process, and with it all others inside."""
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        try:
            self._holder.wait(10)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, 9)
            self._holder.wait(10)
        self._holder.stdout.close()


def plug_in(bridge: Namespaces, host: Namespaces, number: int, address: str) -> None:
    """Join a host to the bridge, as ``eth0`` with that address."""
    end = f"host{number}"
    _net(bridge, "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
    _net(bridge, "link", "set", end, "master", "lab", "up")
    _net(host, "addr", "add", f"{address}/24", "dev", "eth0")
    _net(host, "link", "set", "eth0", "up")


def pull_out(bridge: Namespaces, number: int) -> None:
    """Cut the cable between the bridge and a host."""
    _net(bridge, "link", "delete", f"host{number}")


def set_cable(bridge: Namespaces, number: int, state: str) -> None:
    """Set the bridge's end of a host's cable ``down`` or ``up``; packets are lost meanwhile."""
    _net(bridge, "link", "set", f"host{number}", state)


def _net(where: Namespaces, *words: str) -> None:
    subprocess.run(
        ["nsenter", "--target", str(where.pid), "--net", "ip", *words],
        check=True,
        env={**os.environ, "PATH": SEARCH},
    )
