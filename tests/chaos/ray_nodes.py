"""Hosts made of Linux namespaces with a Ray node each, for runs that lose a whole host.

Each has its own network, processes, name, /dev/shm and Ray session; the disk is everybody's, as a
network file system would be. A host that is killed is gone without a word, its network with it.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from tests.chaos.namespaces import (
    BRIDGE,
    PREFIX,
    ROOT,
    SEARCH,
    Namespaces,
    plug_in,
    pull_out,
    set_cable,
)

PORT = 6379

#: What the first process of a host does: Ray's folder and shared memory are of this host alone.
SCRIPT = """
hostname {name}; ip link set lo up
mkdir -p /tmp/ray; mount -t tmpfs none /tmp/ray; mount -t tmpfs none /dev/shm
"""


class RayHosts:
    """A head and hosts that come and go, joined by a bridge.

    Args:
        folder: for logs.
        environment: variables of every command on a host, Ray's own processes included.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self._folder, self._made = folder, 0
        self._environment = environment or {}
        folder.mkdir(parents=True, exist_ok=True)
        self._bridge = Namespaces(BRIDGE)
        self._hosts: dict[str, tuple[int, Namespaces]] = {}

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{PREFIX}1:{PORT}"

    def start(self, name: str) -> None:
        """Start a host and its Ray node: the first one is the head. Returns when it has joined."""
        self._made += 1
        number, address = self._made, f"{PREFIX}{self._made}"
        inside = Namespaces(SCRIPT.format(name=name), self._bridge)
        self._hosts[name] = number, inside
        plug_in(self._bridge, inside, number, address)
        role = ["--head", "--port", str(PORT)] if number == 1 else ["--address", self.address]
        words = ["ray", "start", *role, "--node-ip-address", address, "--num-cpus", "1"]
        words += ["--object-store-memory", str(100 * 2**20), "--disable-usage-stats"]
        done = self.run(name, *words)
        assert done.returncode == 0, done.stdout

    def kill(self, name: str) -> None:
        """End a host with all its processes, as by a cut cable and power."""
        number, inside = self._hosts.pop(name)
        # First: what ends says goodbye to those who are connected to it.
        pull_out(self._bridge, number)
        os.kill(inside.pid, 9)
        inside.close()

    def set_link(self, name: str, state: str) -> None:
        """Cut the network of a host (``down``), or heal it (``up``)."""
        set_cable(self._bridge, self._hosts[name][0], state)

    def run(self, name: str, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a command on a host to its end."""
        with self.started(name, *words, **environment) as process:
            said, _ = process.communicate(timeout=900)
        return subprocess.CompletedProcess(words, process.returncode, said, "")

    @contextlib.contextmanager
    def started(
        self, name: str, *words: str, **environment: str
    ) -> "Iterator[subprocess.Popen[str]]":
        """A command on a host for the length of a block; it is killed at its end."""
        programs = f"{Path(sys.executable).parent}{os.pathsep}{SEARCH}"
        variables = {
            **os.environ,
            "PATH": programs,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_niceness": "0",
            "RAY_prestart_worker_first_driver": "0",
            **self._environment,
            **environment,
        }
        process = subprocess.Popen(
            [*self._hosts[name][1].enter(), *words],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            # It ends with its child, which nobody else might take note of: then the host, which
            # waits for all of its processes, would not end.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()

    def close(self) -> None:
        """End all hosts."""
        for name in list(self._hosts):
            self.kill(name)
        self._bridge.close()


@contextlib.contextmanager
def ray_hosts(folder: Path, *names: str, **environment: str) -> Iterator[RayHosts]:
    """Hosts of those names for the length of a block; the first is the head."""
    hosts = RayHosts(folder, environment)
    try:
        for name in names:
            hosts.start(name)
        yield hosts
    finally:
        hosts.close()
