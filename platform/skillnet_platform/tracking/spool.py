"""What a run says to its tracker, kept on disk while the tracker is away and sent once it is back.

Every write is a small record (an *operation*). It is tried at once; if the tracker does not
answer, the record and all that follow it go to a JSON-lines file, in order, and are tried again
with growing pauses, so that a dead server costs a run a fraction of a second now and then.
Metrics carry the time at which they were made and MLflow keeps one row for equal (key, step,
time, value): sending one twice leaves one.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from skillnet_platform import console, storage
from skillnet_platform.errors import first_line
from skillnet_platform.tracking.operations import Operation

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
PROBE_S = 0.5
#: Between tries of a record that fails while another one is taken: see :meth:`OperationSpool._send_first`.
DOUBT_PAUSES_S = (0.0, 1.0, 2.0)

_COUNTER = count()

#: MLflow's error codes that mean "not now", as opposed to "never". A password may be set right.
AWAY = {
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "IO_ERROR",
    "UNAUTHENTICATED",
}


def spool_root() -> Path:
    """Where spools are kept: ``<run root>/spool``."""
    return storage.run_root() / "spool"


def is_away(problem: BaseException) -> bool:
    """Whether this error says that the tracker cannot be reached, rather than that it refuses."""
    code = getattr(problem, "error_code", None)
    if code is not None:
        return code in AWAY
    return isinstance(problem, OSError) or type(problem).__module__.startswith(
        ("requests", "urllib3", "sqlalchemy")
    )


class OperationSpool:
    """The operations of one process for one run.

    Args:
        run_id: the MLflow run.
        uri: the tracker that it belongs to.
        apply: sends one operation; raises what the tracker's client raises.
    """

    def __init__(self, run_id: str, uri: str, apply: Callable[[Operation], None]) -> None:
        self.run_id, self.uri = run_id, uri
        self._apply = apply
        self._lock = threading.RLock()
        self._waiting: list[Operation] = []
        self.rejected = 0
        self._pause = FIRST_PAUSE_S
        self._next_try = 0.0
        # Two trackers of one run may live in one process: the driver, and rank 0 in it.
        name = f"{run_id}.{_host()}.{os.getpid()}-{next(_COUNTER)}.jsonl"
        self.path = spool_root() / name

    @property
    def _files(self) -> Path:
        """Copies of artifacts that wait."""
        return self.path.with_suffix("")

    def __len__(self) -> int:
        return len(self._waiting)

    def send(self, operation: Operation) -> None:
        """Send now if the tracker is there, otherwise keep it."""
        with self._lock:
            if not self._waiting:
                try:
                    self._apply_or_reject(operation)
                except Exception as problem:
                    if not is_away(problem):
                        raise
                    self._keep(operation)
                    self._away(problem)
                return
            self._keep(operation)
            if time.monotonic() >= self._next_try:
                self.flush()

    def flush(self) -> bool:
        """Try to send everything that waits; True if nothing is left."""
        with self._lock:
            sent = 0
            try:
                if self._waiting:
                    _require_listener(self.uri)
                for operation in self._waiting:
                    self._send_first(operation)
                    sent += 1
            except Exception as problem:
                if not is_away(problem):
                    raise
                self._away(problem)
            if sent or not self._waiting:
                del self._waiting[:sent]
                self._rewrite()
                if not self._waiting:
                    self._pause = FIRST_PAUSE_S
                    console.note(f"the tracker is back: {sent} records sent")
            return not self._waiting

    def adopt(self, path: Path) -> int:
        """Send what a process that ended left in ``path``; how many records, 0 if still away."""
        _, operations = read_spool(path)
        with self._lock:
            self.path, self._waiting = path, list(operations)
            return len(operations) if self.flush() else 0

    def _apply_or_reject(self, operation: Operation) -> None:
        try:
            self._apply(operation)
        except Exception as problem:
            if is_away(problem):
                raise
            # A tracker that refuses one record must not end a training run.
            self._reject(operation, f"the tracker refused {operation['kind']}: {problem}")

    def _send_first(self, operation: Operation) -> None:
        """Send the record that waits longest; set it aside if it alone keeps the others waiting.

        An error of the server is what a tracker that is away answers, and what it answers for
        good to a record that it cannot digest. The two differ in what becomes of the newest
        record: as long as that is not taken either, in turn with this one, all of them wait.
        """
        try:
            self._apply_or_reject(operation)
        except Exception as problem:
            newest = self._waiting[-1]
            if operation is newest:
                raise
            for pause in DOUBT_PAUSES_S:
                try:
                    self._apply(newest)  # and again in its turn, which changes nothing
                except Exception:
                    raise problem from None
                time.sleep(pause)
                try:
                    self._apply_or_reject(operation)
                    return
                except Exception as again:
                    problem = again
            what = f"the tracker takes other records and fails at {operation['kind']}"
            self._reject(operation, f"{what}: {first_line(problem)}")

    def _reject(self, operation: Operation, words: str) -> None:
        rejected = self.path.with_suffix(".rejected")
        rejected.parent.mkdir(parents=True, exist_ok=True)
        if operation["kind"] == "artifact" and Path(operation["path"]).is_relative_to(self._files):
            # The copy would go with those that were sent.
            source = Path(operation["path"])
            kept = self.path.with_suffix(".rejected-files") / source.relative_to(self._files)
            kept.parent.mkdir(parents=True, exist_ok=True)
            source.replace(kept)
            operation = {**operation, "path": str(kept)}
        with rejected.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(operation, ensure_ascii=False) + "\n")
        self.rejected += 1
        console.warn(f"{words}; it is set aside in {rejected} ({self.rejected} so far)")

    def _keep(self, operation: Operation) -> None:
        if operation["kind"] == "artifact" and Path(operation["path"]).is_file():
            # The file may be gone, and this process too, before the tracker is back.
            source = Path(operation["path"])
            kept = self._files / operation["folder"] / source.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            if source != kept:
                shutil.copyfile(source, kept)
            operation = {**operation, "path": str(kept)}
        self._waiting.append(operation)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.exists() else 0
        lines = [json.dumps(operation, ensure_ascii=False)]
        if not size:
            lines.insert(0, json.dumps({"run_id": self.run_id, "uri": self.uri}))
        try:
            with storage.disk_guard(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write("\n".join(lines) + "\n")
        except BaseException:
            with contextlib.suppress(OSError):  # half a line would spoil the next one
                os.truncate(self.path, size)
            raise

    def _rewrite(self) -> None:
        if not self._waiting:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self._files, ignore_errors=True)
            return
        with storage.atomic_write(self.path, "w") as stream:
            stream.write(json.dumps({"run_id": self.run_id, "uri": self.uri}) + "\n")
            for operation in self._waiting:
                stream.write(json.dumps(operation, ensure_ascii=False) + "\n")

    def _away(self, problem: BaseException) -> None:
        if self._pause == FIRST_PAUSE_S:
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
            console.warn(
                f"the tracker {self.uri} does not answer ({reason}); records wait in {self.path}"
            )
        self._next_try = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE_S)


def find_leftover_spools(uri: str) -> list[Path]:
    """Spools for this tracker whose process, on this machine, has ended.

    One whose first line was cut short, by a kill or a full disk, is set aside with a warning.
    """
    found = []
    for path in sorted(spool_root().glob("*.jsonl")):
        _, _, rest = path.stem.partition(".")
        host, _, process = rest.partition(".")
        pid = process.partition("-")[0]
        if host != _host() or not pid.isdigit() or storage.process_is_alive(int(pid)):
            continue
        try:
            if _header(path)["uri"] == uri:
                found.append(path)
        except OSError:
            continue  # another process sent it meanwhile, or it is another user's
        except ValueError:
            aside = path.with_suffix(".unreadable")
            path.replace(aside)
            console.warn(
                f"{path}: records for a tracker without a readable first line, which says what "
                f"tracker; set aside as {aside.name}"
            )
    return found


def read_spool(path: Path) -> tuple[str, list[Operation]]:
    """The run id and the operations in a spool file, without lines cut short by a kill."""
    operations = []
    # Not splitlines(): texts may hold the other characters at which that cuts.
    for line in path.read_text(encoding="utf-8").split("\n")[1:]:
        with contextlib.suppress(json.JSONDecodeError):
            operations.append(json.loads(line))
    return _header(path)["run_id"], operations


def _header(path: Path) -> dict[str, str]:
    """What the first line says: ``run_id`` and ``uri``.

    Raises:
        ValueError: it is not there, or not whole.
    """
    with path.open(encoding="utf-8") as stream:
        told: dict[str, str] = json.loads(stream.readline())
    if not isinstance(told, dict) or not {"run_id", "uri"} <= set(told):
        raise ValueError(f"{path}: no run and tracker in the first line")
    return told


def _require_listener(uri: str) -> None:
    """A request to a host that is gone takes seconds to fail; a connection is quicker to try.

    Raises:
        OSError: nobody listens there.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=PROBE_S).close()


def _host() -> str:
    return socket.gethostname().replace(".", "-")
