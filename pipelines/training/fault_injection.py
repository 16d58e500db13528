"""Faults to order, by (rank, step): what the tests of recovery and the chaos lane break.

    SKILLNET_FAULTS='{"rank": 1, "step": 7, "kind": "kill"}' skillnet finetune …

One fault or a list of them. Each happens once in a run: a marker in the run's ``faults`` folder
keeps it from happening again after the recovery. Without the variable nothing is read or done.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from pipelines.training import preemption
from skillnet_platform import config as configuration
from skillnet_platform import console, storage
from skillnet_platform.errors import UserError

VARIABLE = "SKILLNET_FAULTS"
DRIVER_VARIABLE = "SKILLNET_FAULTS_DRIVER"
FOLDER = "faults"
BALLAST = "ballast"

#: Longest wait for a notice to arrive, or for the end of this worker.
WAIT_S = 60.0

#: Longest that a worker is held.
HOLD_S = 600.0

#: A disk with more room than this is not one to fill.
LARGEST_DISK = 256 * 2**20


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        step: it happens when so many steps are done, after the checkpoint of that step.
        kind: ``kill`` and ``term`` send SIGKILL and SIGTERM to the victim, and a notice to the
            worker (the driver: for rank 0) has arrived before the next step, as the end of a worker
            has that others bring about; ``raise`` raises
            RuntimeError; ``flip`` turns one bit of the newest checkpoint over and kills this
            worker; ``tear`` kills this worker while it writes its next checkpoint; ``full`` fills
            the disk of the run's folder, which must be a small one, with a file ``faults/ballast``;
            ``hold`` stops this worker until its marker in ``faults`` is taken away or it is asked
            to leave: time for what is done to the run from outside.
        rank: the worker that does it; none: all of them. Only rank 0 knows that the checkpoint of
            the step is written: others may be ahead of it.
        victim: whom a signal goes to: this ``worker``; the ``driver`` of the run; the
            ``controller`` of the fit, or the ``raylet``, of this worker on this machine; or
            another process, by its id; or all of its group, by its id with a minus.
        place: of the bit to flip, as a share of the checkpoint's bytes.
    """

    step: int
    kind: Literal["kill", "term", "raise", "flip", "tear", "full", "hold"]
    rank: Optional[int] = 0  # noqa: UP045 - jsonargparse words this form better
    victim: str = "worker"
    place: float = 0.5

    def __post_init__(self) -> None:
        if not _is_number(self.victim) and self.victim not in _VICTIMS:
            raise ValueError(f"victim {self.victim!r}: {', '.join(_VICTIMS)}, or a process id")
        if not 0 <= self.place < 1:
            raise ValueError(f"place must be in [0, 1), got {self.place}")


def environment() -> dict[str, str]:
    """What workers need in their environment to know of the faults; nothing without any."""
    if VARIABLE not in os.environ:
        return {}
    return {VARIABLE: os.environ[VARIABLE], DRIVER_VARIABLE: str(os.getpid())}


def ordered(run: Path | None, rank: int) -> "Faults | None":
    """The faults that this rank still has to do in a run; none if nothing is ordered.

    Raises:
        UserError: the variable does not hold faults.
    """
    told = os.environ.get(VARIABLE)
    if not told or run is None:
        return None
    try:
        given = json.loads(told)
        each = [given] if isinstance(given, dict) else given
        faults = [configuration.build(Fault, one) for one in each]
    except (ValueError, TypeError) as problem:
        raise UserError(f"{VARIABLE}: {problem}") from None
    waiting = {
        run / FOLDER / f"{number}-{fault.kind}-{fault.step}": fault
        for number, fault in enumerate(faults)
        if fault.rank in (rank, None)
    }
    return Faults(run, {path: fault for path, fault in waiting.items() if not path.exists()})


class Faults:
    """The faults of a rank that have not happened yet.

    Args:
        run: folder of the run.
        waiting: marker -> fault.
    """

    def __init__(self, run: Path, waiting: dict[Path, Fault]) -> None:
        self._run, self._waiting = run, waiting

    def at(self, step: int) -> None:
        """Do the faults that are due when ``step`` steps are done."""
        for marker, fault in list(self._waiting.items()):
            if fault.step == step:
                del self._waiting[marker]
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.write_text(str(time.time()), encoding="ascii")
                self._do(fault, marker)

    def _do(self, fault: Fault, marker: Path) -> None:
        console.warn(f"{VARIABLE}: {fault.kind} of the {fault.victim} after step {fault.step}")
        if fault.kind in ("kill", "term"):
            number = signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM
            os.kill(_process_of(fault.victim), number)
            # What follows shall hang on the step and not on speed.
            if fault.kind == "term" and fault.victim in ("worker", "driver"):
                _await(preemption.asked)
            elif fault.victim in ("driver", "controller", "raylet"):
                _await(lambda: False)  # the end, which these bring about soon
        elif fault.kind == "hold":
            _await(lambda: preemption.asked() or not marker.exists(), HOLD_S)
            marker.touch()
        elif fault.kind == "raise":
            raise RuntimeError(f"a fault to order after step {fault.step}")
        elif fault.kind == "full":
            fill_disk(self._run)
        elif fault.kind == "tear":
            threading.Thread(target=self._tear, name="fault", daemon=True).start()
        else:
            flip_bit(self._run / "checkpoints", fault.place)
            os.kill(os.getpid(), signal.SIGKILL)

    def _tear(self) -> None:
        """Die as soon as a file of a half-written checkpoint is there."""
        while not any((self._run / "checkpoints").glob(".step-*.tmp/*")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)


def flip_bit(folder: Path, place: float) -> tuple[Path, int]:
    """Turn over one bit of the newest checkpoint below a folder: its file and the byte's number.

    Args:
        folder: of checkpoints.
        place: of the bit, as a share of the bytes of all files of the checkpoint.

    Raises:
        UserError: there is no checkpoint yet.
    """
    if not any(folder.glob("step-*")):
        raise UserError(
            f"{VARIABLE}: {folder} holds no checkpoint to flip a bit of; order it later"
        )
    newest = max(folder.glob("step-*"), key=lambda path: path.name)
    files = sorted(path for path in newest.iterdir() if path.is_file())
    position = int(place * sum(path.stat().st_size for path in files))
    for path in files:
        size = path.stat().st_size
        if position < size:
            with path.open("r+b") as stream:
                stream.seek(position)
                (byte,) = stream.read(1)
                stream.seek(position)
                stream.write(bytes([byte ^ 1 << position % 8]))
            return path, position
        position -= size
    raise AssertionError(f"{newest} holds no bytes")


def fill_disk(run: Path) -> Path:
    """Fill the file system of a run's folder; the file that has to go to free it again.

    Raises:
        UserError: it has too much room to be one for this.
    """
    free = storage.free_bytes(run)
    if free > LARGEST_DISK:
        raise UserError(
            f"{VARIABLE}: {run} has {storage.human_bytes(free)} free; fill only a disk of less "
            f"than {storage.human_bytes(LARGEST_DISK)}"
        )
    path = run / FOLDER / BALLAST
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as stream:
        for block in (2**20, 2**12, 1):
            try:
                while stream.write(bytes(block)):
                    pass
            except OSError:
                continue
    return path


def _await(there: Callable[[], bool], seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not there() and time.monotonic() < end:
        time.sleep(0.01)


def _process_of(victim: str) -> int:
    """The process id of a victim on this machine."""
    return int(victim) if _is_number(victim) else _VICTIMS[victim]()


def _is_number(victim: str) -> bool:
    return victim.removeprefix("-").isdigit()


def _driver() -> int:
    return int(os.environ.get(DRIVER_VARIABLE, os.getpid()))


def _raylet() -> int:
    found: int = _ancestor("raylet").pid
    return found


def _controller() -> int:
    for process in _ancestor("raylet").children(recursive=True):
        words = process.cmdline()
        if words and words[0].startswith("ray::TrainController"):
            found: int = process.pid
            return found
    raise UserError(f"{VARIABLE}: there is no controller: this run is not on Ray")


def _ancestor(name: str) -> Any:
    import psutil

    for process in psutil.Process().parents():
        if process.name() == name:
            return process
    raise UserError(f"{VARIABLE}: there is no {name}: this run is not on Ray")


_VICTIMS = {
    "worker": os.getpid,
    "driver": _driver,
    "raylet": _raylet,
    "controller": _controller,
}
