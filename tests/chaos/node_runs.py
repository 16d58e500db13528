"""Chaos runs over two nodes: each node has one worker, and one complete node is killed.

Nodes are namespaces with one Ray node each (:mod:`tests.chaos.ray_nodes`). The first is Ray's
head and runs the driver. Both workers pause after the drawn step. The worker whose node stays is
released first. It waits for the other worker in the next all-reduce, where the loss of the node
reaches it.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos.namespaces import ROOT
from tests.chaos.ray_nodes import RayHosts
from tests.chaos.result_rows import Row
from tests.helpers.waiting import wait_until

#: The first leaves the run to itself; the others end it.
FAULTS = ("host killed", "head's host killed", "spot notice")
#: The network of the node without the driver is cut, and heals after this number of seconds.
CUTS_S = {"network cut for 10 s": 10.0, "network cut for 120 s": 120.0}
LATER_FAULTS = tuple(CUTS_S)
#: Programs that these need beside those of hosts: they are watch_spot.sh's.
PROGRAMS = ("curl", "flock", "pgrep")
HEAD = "head"
WATCHER = ROOT / "platform" / "deploy" / "watch_spot.sh"
#: Of the metadata service that a host has for itself.
PORT = 8900
#: Ray removes a node within this number of seconds.
NODE_LOSS_S = 60.0
#: Seconds in which a healed node may disturb the run, before it is replaced.
HEAL_S = 20.0
#: Seconds for a run to come to its step, and for its end.
PATIENCE_S = 900.0


def holds(step: int) -> list[dict[str, Any]]:
    """Orders for a run that is to be disturbed from outside after a step: both workers wait."""
    return [{"rank": rank, "step": step, "kind": "hold"} for rank in (0, 1)]


class Hosts:
    """Two hosts that are started when a command needs them, and kept for the next one.

    Args:
        folder: for what they keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._made = folder, 0
        self._hosts: RayHosts | None = None
        self._other: str | None = None

    def attempt(self, words: Sequence[str], run: Path, row: Row | None = None) -> int:
        """The command of a run, on the head; its exit code.

        Args:
            words: the command.
            run: folder of the run.
            row: what happens to it, if something does; its victim is written there.

        Raises:
            AssertionError: the run did not come to the step of the row.
        """
        hosts = self._ready()
        with contextlib.ExitStack() as stack:
            environment = {"RAY_ADDRESS": hosts.address}
            process = stack.enter_context(hosts.started(HEAD, *words, **environment))
            if row is not None:
                markers = [run / "faults" / f"{rank}-hold-{row.step}" for rank in (0, 1)]
                wait_until(lambda: all(map(Path.exists, markers)), PATIENCE_S, process=process)
                self._disturb(hosts, run, row, markers, stack)
            said, _ = process.communicate(timeout=PATIENCE_S)
        sys.stderr.write(said)
        if row is not None and row.fault == "spot notice":
            self._lose(hosts)
        return process.returncode

    def close(self) -> None:
        """End the hosts."""
        if self._hosts is not None:
            self._hosts.close()
        self._hosts = self._other = None

    def _disturb(
        self,
        hosts: RayHosts,
        run: Path,
        row: Row,
        markers: Sequence[Path],
        stack: contextlib.ExitStack,
    ) -> None:
        """Do what is due to a run whose workers are held; what it starts ends with the stack."""
        assert self._other is not None
        of_head = row.fault == "head's host killed"
        rank = _rank_on(hosts, self._other, run)
        rank = 1 - rank if of_head else rank
        row.victim = f"host of {'head, driver and ' if of_head else ''}rank {rank}"
        markers[1 - rank].unlink()
        if row.fault == "host killed":
            self._lose(hosts)
            self._join(hosts)
        elif row.fault in CUTS_S:
            # The other worker continues too: it meets the cut in its next collective operation.
            markers[rank].unlink()
            self._cut(hosts, CUTS_S[row.fault])
        elif of_head:
            hosts.kill(HEAD)
            # Ray ends a node without its head, so a new head needs new nodes.
            self.close()
        else:
            service = [sys.executable, "-m", "tests.chaos.spot_metadata", str(PORT)]
            environment = {
                "HOME": str(self._folder / self._other),
                "SKILLNET_METADATA": f"http://127.0.0.1:{PORT}",
            }
            stack.enter_context(hosts.started(self._other, *service))
            stack.enter_context(hosts.started(self._other, "bash", str(WATCHER), **environment))

    def _cut(self, hosts: RayHosts, seconds: float) -> None:
        """Cut the network of the host without the driver, and heal it after some seconds.

        Ray removes a node that it has not reached for about half a minute. The removed node ends
        itself when its network is back, and another one joins.
        """
        assert self._other is not None
        hosts.set_link(self._other, "down")
        time.sleep(seconds)
        hosts.set_link(self._other, "up")
        if seconds > NODE_LOSS_S:
            time.sleep(HEAL_S)
            self._lose(hosts)
            self._join(hosts)

    def _ready(self) -> RayHosts:
        if self._hosts is None:
            self._hosts = RayHosts(self._folder)
            self._hosts.start(HEAD)
        if self._other is None:
            self._join(self._hosts)
        return self._hosts

    def _join(self, hosts: RayHosts) -> None:
        self._made += 1
        self._other = f"host{self._made}"
        hosts.start(self._other)

    def _lose(self, hosts: RayHosts) -> None:
        assert self._other is not None
        hosts.kill(self._other)
        self._other = None


def _rank_on(hosts: RayHosts, name: str, run: Path) -> int:
    """The rank of the worker on a host without a driver: it is rank 0 that writes the progress."""
    look = 'ls -l /proc/[0-9]*/fd 2>/dev/null | grep -qF " $0"'
    return int(hosts.run(name, "bash", "-c", look, str(run / "progress.jsonl")).returncode != 0)
