"""Hosts made of Linux namespaces: each with its own network, mounts, processes, name and sshd.

    test process ── lab: a process namespace, in it a bridge ──┬── client   10.77.0.1
                                                               ├── head     10.77.0.2
                                                               └── worker   10.77.0.3

A host sees this machine's files, except that its home, /tmp, /dev/shm, /run and /etc/hosts are its
own, and that the checkout is not there (its virtual environment is, without our package: what
``setup_node.sh`` would have installed). What runs make lies in the home: hosts share no disk. With
a shared folder they are the nodes of a SLURM cluster: they see the checkout, the package and the
folder, and log in to each other.

Everything (processes, mounts, interfaces) ends with the test, however that ends:
:mod:`tests.chaos.namespaces`.
"""

import contextlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.namespaces import BRIDGE, PREFIX, ROOT, SEARCH, Namespaces, plug_in
from tests.helpers.waiting import wait_until

#: Home of the user of the hosts, where ssh, bash and Ray look for their files.
HOST_HOME = Path("~root").expanduser()

#: Programs of this machine without which a host is none.
NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "curl", "pgrep", "unshare", "nsenter")


@dataclass
class Host:
    """One host of the lab."""

    name: str
    address: str
    inside: Namespaces
    environment: dict[str, str] = field(default_factory=dict)

    def run(
        self, *words: str, seconds: float = 180, check: bool = True, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end; a failure, or a command that is late, shows what it said."""
        done = subprocess.run(
            [*self._enter(), "timeout", "--kill-after=5", str(seconds), *words],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{self.name}: {' '.join(words)} ended with {done.returncode}\n"
                f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
            )
        return done

    def start(self, *words: str, **options: object) -> "subprocess.Popen[str]":
        """Start a command and leave it running; it ends with the lab at the latest."""
        return subprocess.Popen(
            [*self._enter(), *words],
            env=self.environment,
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def _enter(self) -> list[str]:
        where = ROOT if self.name == "client" else HOST_HOME
        return [*self.inside.enter(), "env", f"--chdir={where}"]


@contextlib.contextmanager
def lab(
    folder: Path, names: Sequence[str], shared: Path | None = None
) -> Iterator[dict[str, Host]]:
    """A client and hosts of those names, joined by a bridge; the client can log in to all.

    Args:
        folder: for keys and what else the client is to have; hosts may read it, not write to it.
        names: hosts to start beside ``client``.
        shared: existing folder that all hosts may write to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _make_keys(folder)
    with contextlib.ExitStack() as opened:
        bridge = Namespaces(BRIDGE)
        opened.callback(bridge.close)
        hosts = {}
        for number, name in enumerate(["client", *names], 1):
            address = f"{PREFIX}{number}"
            inside = Namespaces(_host_script(name, folder, shared), bridge)
            opened.callback(inside.close)
            plug_in(bridge, inside, number, address)
            home = {"HOME": str(HOST_HOME), "USER": "root", "SHELL": "/bin/bash", "LANG": "C.UTF-8"}
            binaries = (
                f"{Path(sys.executable).parent}:{SEARCH}" if name == "client" or shared else SEARCH
            )
            hosts[name] = Host(name, address, inside, {**home, "PATH": binaries})
        _wait_for_ssh(hosts)
        yield hosts


def _make_keys(folder: Path) -> None:
    for name in ("client_key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/client_key.pub\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nStrictModes no\n"
        "UsePAM no\nUseDNS no\nPidFile none\nAcceptEnv none\n"
    )
    (folder / "ssh_config").write_text(
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    (folder / "hosts").mkdir()


def _host_script(name: str, folder: Path, shared: Path | None) -> str:
    """What the first process of a host does: names, mounts, and the ssh server."""
    etc = folder / "hosts" / name
    # As Debian has it: the name leads to loopback, where the other hosts never meet it.
    etc.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    client = name == "client" or shared is not None
    own = [Path("/tmp"), HOST_HOME, Path("/run")]
    kept = {Path(sys.base_prefix), Path(sys.prefix), folder} | ({shared} if shared else set())
    if client:
        kept.add(ROOT)
    else:
        own.append(ROOT)
    again = sorted(path for path in kept if any(path.is_relative_to(top) for top in own))
    lines = [f"hostname {name}", "ip link set lo up", f"mount --bind {etc} /etc/hosts"]
    lines += ["mount -t tmpfs none /mnt"]
    for number, path in enumerate(again):
        lines += [f"mkdir /mnt/{number}", f"mount --rbind {path} /mnt/{number}"]
    # A checkout below another mount is created again in the covering mount.
    lines += [f"mkdir -p {top}; mount -t tmpfs -o mode=0755 none {top}" for top in own]
    lines += ["mount -t tmpfs none /dev/shm", "chmod 1777 /tmp /dev/shm"]
    for number, path in enumerate(again):
        lines += [f"mkdir -p {path}", f"mount --rbind /mnt/{number} {path}"]
        lines += [f"umount --lazy /mnt/{number}"]
    if client:
        lines += [
            f"mkdir -m 700 {HOST_HOME}/.ssh",
            f"cp {folder}/client_key {HOST_HOME}/.ssh/id_ed25519",
        ]
        lines += [f"cp {folder}/ssh_config {HOST_HOME}/.ssh/config"]
    if name != "client":
        lines += [f"mount --bind {folder} {folder}", f"mount -o remount,bind,ro {folder}"]
        if shared is None:
            lines += [f"mount -t tmpfs -o ro none {path}" for path in _own_package("*.dist-info")]
            lines += [f"mount --bind /dev/null {path}" for path in _own_package("*.pth")]
        # Ray lowers its priority below all other processes that share the cores, and starts a
        # process per core for a job's driver, which needs another environment than the job's.
        settings = "RAY_worker_niceness=0 RAY_prestart_worker_first_driver=0"
        lines += [f"echo 'export {settings}' >{HOST_HOME}/.bashrc"]
        lines += ["mkdir /run/sshd", f"$(command -v sshd) -f {folder}/sshd_config"]
    return "\n".join(lines)


def _own_package(pattern: str) -> list[Path]:
    """Traces of our own package in the virtual environment that the hosts borrow."""
    packages = Path(sysconfig.get_path("purelib"))
    return [path for path in packages.glob(pattern) if "skillnet_platform" in path.name]


def _wait_for_ssh(hosts: dict[str, Host]) -> None:
    def run_ssh(host: Host) -> "subprocess.CompletedProcess[str]":
        return hosts["client"].run("ssh", host.address, "true", check=False)

    for host in hosts.values():
        if host.name != "client":
            wait_until(
                lambda host=host: run_ssh(host).returncode == 0,
                60,
                lambda host=host: f"{host.name}: {run_ssh(host).stderr}",
            )
