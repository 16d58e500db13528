"""Fault injection: a training callback that breaks a run at a given (rank, step).

    SKILLNET_FAULTS='{"rank": 1, "step": 7, "kind": "kill"}' python -m tests.chaos.faulty_finetune …

The variable holds one fault or a list of faults; only this package reads it. Each fault happens
once in a run: a marker in the run's ``faults`` folder prevents a repetition after the recovery.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop import preemption
from skillnet_platform import config as configuration
from skillnet_platform import console, storage
from skillnet_platform.errors import UserError

VARIABLE = "SKILLNET_FAULTS"
FOLDER = "faults"
BALLAST = "ballast"

#: Longest wait for a stop request to arrive, or for the end of this worker.
WAIT_S = 60.0

#: Longest time that a worker is held.
HOLD_S = 600.0

#: A disk with more free bytes than this is not filled.
LARGEST_DISK = 256 * 2**20


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        step: the fault happens after this number of steps, and after their checkpoint.
        kind: ``kill`` and ``term`` send SIGKILL and SIGTERM to the victim, and the effect on this
            worker has arrived before the next step; ``stop`` sends SIGSTOP, and nobody continues
            the victim; ``raise`` raises RuntimeError; ``flip``
            inverts one bit of the newest checkpoint and kills this worker; ``tear`` kills this
            worker while it writes its next checkpoint; ``full`` fills the disk of the run's
            folder, which must be small, with a file ``faults/ballast``; ``hold`` stops this worker
            until its marker in ``faults`` is removed or a stop is requested, so that a test can
            act on the run.
        rank: the worker that injects the fault; None for all. Only rank 0 knows that the
            checkpoint of the step is written: others may be ahead of it.
        victim: target of a signal: this ``worker``; the ``driver`` of the run; the ``controller``
            of the fit, or the ``raylet``, of this worker on this node; or another process by its
            id; or its process group by its id with a minus sign.
        place: position of the bit to flip, as a fraction of the checkpoint's bytes.
    """

    step: int
    kind: Literal["kill", "term", "stop", "raise", "flip", "tear", "full", "hold"]
    rank: int | None = 0
    victim: str = "worker"
    place: float = 0.5

    def __post_init__(self) -> None:
        if not _is_number(self.victim) and self.victim not in _VICTIMS:
            raise ValueError(f"victim {self.victim!r}: {', '.join(_VICTIMS)}, or a process id")
        if not 0 <= self.place < 1:
            raise ValueError(f"place must be in [0, 1), got {self.place}")


def parse_faults(text: str) -> list[Fault]:
    """Parse one fault, or a list of them, from JSON.

    Raises:
        UserError: the text holds no faults.
    """
    try:
        given = json.loads(text)
        each = [given] if isinstance(given, dict) else given
        return [configuration.build_config(Fault, one) for one in each]
    except (ValueError, TypeError) as error:
        raise UserError(f"{VARIABLE}: {error}") from None


def faults_of_environment() -> "list[FaultInjection]":
    """Return the callbacks that ``SKILLNET_FAULTS`` asks for: one, or none."""
    text = os.environ.get(VARIABLE)
    return [FaultInjection(parse_faults(text))] if text else []


def finetune_with_faults(config: FinetuneConfig, *faults: dict[str, Any]) -> dict[str, Any]:
    """Do a run of ``skillnet finetune`` with faults, each with the keys of :class:`Fault`."""
    from pipelines.finetune import run_end_to_end

    callbacks = [FaultInjection(parse_faults(json.dumps(faults)))]
    return run_end_to_end(config, "finetune", callbacks=callbacks)


class FaultInjection:
    """Training callback that injects faults, see :mod:`pipelines.training.loop.reporter`.

    Args:
        faults: planned failures of all ranks.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = list(faults)
        # The driver creates the callback and sends it to the workers.
        self._driver = os.getpid()
        self._run = Path()
        self._waiting: dict[Path, Fault] = {}

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Select the faults of this rank that have not happened yet."""
        if folder is None:
            return
        self._run = folder
        markers = {
            folder / FOLDER / f"{number}-{fault.kind}-{fault.step}": fault
            for number, fault in enumerate(self._faults)
            if fault.rank in (rank, None)
        }
        self._waiting = {path: fault for path, fault in markers.items() if not path.exists()}

    def on_step_start(self, step: int) -> None:
        """Inject the faults that are due when ``step`` steps are done."""
        for marker, fault in list(self._waiting.items()):
            if fault.step == step:
                del self._waiting[marker]
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.write_text(str(time.time()), encoding="ascii")
                self._do(fault, marker)

    def _do(self, fault: Fault, marker: Path) -> None:
        console.print_warning(
            f"{VARIABLE}: {fault.kind} of the {fault.victim} after step {fault.step}"
        )
        if fault.kind in _SIGNALS:
            os.kill(self._process_of(fault.victim), _SIGNALS[fault.kind])
            # The effect must depend on the step and not on speed.
            if fault.kind == "term" and fault.victim in ("worker", "driver"):
                _await(preemption.stop_requested)
            elif fault.victim in ("driver", "controller", "raylet"):
                _await(lambda: False)  # this worker ends soon
        elif fault.kind == "hold":
            _await(lambda: preemption.stop_requested() or not marker.exists(), HOLD_S)
            marker.touch()
        elif fault.kind == "raise":
            raise RuntimeError(f"an injected fault after step {fault.step}")
        elif fault.kind == "full":
            fill_disk(self._run)
        elif fault.kind == "tear":
            threading.Thread(target=self._tear, name="fault", daemon=True).start()
        else:
            flip_bit(self._run / "checkpoints", fault.place)
            os.kill(os.getpid(), signal.SIGKILL)

    def _process_of(self, victim: str) -> int:
        """The process id of a victim on this machine."""
        if _is_number(victim):
            return int(victim)
        return self._driver if victim == "driver" else _PROCESSES[victim]()

    def _tear(self) -> None:
        """Die as soon as a file of a partial checkpoint exists."""
        while not any((self._run / "checkpoints").glob(".step-*.tmp/*")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)


def flip_bit(folder: Path, place: float) -> tuple[Path, int]:
    """Invert one bit of the newest checkpoint in a folder; return its file and the byte's position.

    Args:
        folder: directory of checkpoints.
        place: position of the bit, as a fraction of the bytes of all files of the checkpoint.

    Raises:
        UserError: there is no checkpoint yet.
    """
    if not any(folder.glob("step-*")):
        raise UserError(
            f"{VARIABLE}: {folder} holds no checkpoint to flip a bit of; choose a later step"
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
    """Fill the file system of a run's folder; return the file whose removal frees it.

    Raises:
        UserError: the file system is too large.
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


def _await(is_done: Callable[[], bool], seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not is_done() and time.monotonic() < end:
        time.sleep(0.01)


def _is_number(victim: str) -> bool:
    return victim.removeprefix("-").isdigit()


def _raylet() -> int:
    found: int = _ancestor("raylet").pid
    return found


def _controller() -> int:
    for process in _ancestor("raylet").children(recursive=True):
        arguments = process.cmdline()
        if arguments and arguments[0].startswith("ray::TrainController"):
            found: int = process.pid
            return found
    raise UserError(f"{VARIABLE}: there is no controller: this run is not on Ray")


def _ancestor(name: str) -> Any:
    import psutil

    for process in psutil.Process().parents():
        if process.name() == name:
            return process
    raise UserError(f"{VARIABLE}: there is no {name}: this run is not on Ray")


_PROCESSES: dict[str, Callable[[], int]] = {
    "worker": os.getpid,
    "raylet": _raylet,
    "controller": _controller,
}
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
_VICTIMS = ("worker", "driver", "raylet", "controller")
