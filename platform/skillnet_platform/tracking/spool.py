"""Spool of tracker writes: kept on disk while the tracker is unreachable, and sent afterwards.

Every write is a small record (an *operation*), which is sent at once. If the tracker does not
answer, the record and all later records go to a JSON-lines file in order. They are retried with
growing pauses, so a dead server costs a run a fraction of a second at a time. Metrics carry their
time, and MLflow keeps one row for equal (key, step, time, value), so a repeated send has no effect.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from skillnet_platform import console, storage
from skillnet_platform.errors import first_line
from skillnet_platform.storage.locks import visible_processes

Operation = dict[str, Any]

PARAMETERS_PER_BATCH = 100
METRICS_PER_BATCH = 1000


def apply_operation(client: Any, run_id: str, operation: Operation) -> None:
    """Send one operation through an ``MlflowClient``, and raise the client's errors.

    Every operation is idempotent.

    Args:
        client: ``MlflowClient``.
        run_id: MLflow run.
        operation: record with a ``kind``.
    """
    _SENDERS[operation["kind"]](client, run_id, operation)


def _metrics(client: Any, run_id: str, operation: Operation) -> None:
    from mlflow.entities import Metric

    when, step = operation["time"], operation["step"]
    # The time of the measurement keeps a repeated send from adding a second row.
    points = [Metric(name, value, when, step) for name, value in operation["values"].items()]
    # One batch is far cheaper than single metrics, but MLflow limits its size.
    for first in range(0, len(points), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=points[first : first + METRICS_PER_BATCH])


def _params(client: Any, run_id: str, operation: Operation) -> None:
    """Set new parameters. MLflow's parameters cannot change: a different value becomes a tag."""
    from mlflow.entities import Param, RunTag

    # A retry or a resumed run sends parameters again, and MLflow refuses changes.
    known = client.get_run(run_id).data.params
    values = operation["values"]
    new = [Param(key, value) for key, value in values.items() if key not in known]
    for first in range(0, len(new), PARAMETERS_PER_BATCH):
        client.log_batch(run_id, params=new[first : first + PARAMETERS_PER_BATCH])
    changed = {key: value for key, value in values.items() if known.get(key, value) != value}
    if changed:
        tags = [RunTag(f"changed.{key}", value) for key, value in changed.items()]
        client.log_batch(run_id, tags=tags)


def _tags(client: Any, run_id: str, operation: Operation) -> None:
    from mlflow.entities import RunTag

    tags = [RunTag(key, value) for key, value in operation["values"].items()]
    client.log_batch(run_id, tags=tags)


def _input(client: Any, run_id: str, operation: Operation) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    fields = ("name", "digest", "source_type", "source", "schema", "profile")
    dataset = Dataset(*(operation[name] for name in fields))
    tag = InputTag("mlflow.data.context", operation["context"])
    client.log_inputs(run_id, [DatasetInput(dataset, [tag])])


def _artifact(client: Any, run_id: str, operation: Operation) -> None:
    path, folder = Path(operation["path"]), operation["folder"] or None
    if path.is_dir():
        client.log_artifacts(run_id, str(path), folder)
    else:
        client.log_artifact(run_id, str(path), folder)


def _end(client: Any, run_id: str, operation: Operation) -> None:
    # The recorded time: the tracker may answer long after the end.
    client.set_terminated(run_id, operation["status"], operation["time"])


_SENDERS = {
    "metrics": _metrics,
    "params": _params,
    "tags": _tags,
    "input": _input,
    "artifact": _artifact,
    "end": _end,
}


FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
PROBE_S = 0.5
#: Age of a spool at which a process that cannot be seen is taken for ended. A living process
#: records more often.
UNSEEN_AGE_S = 3600.0
#: Seconds between retries of a record that fails while the tracker accepts another record; see
#: :meth:`OperationSpool._send_first`.
DOUBT_PAUSES_S = (0.0, 1.0, 2.0)

_COUNTER = count()

#: MLflow's error codes for a temporary failure. A wrong password can be corrected.
AWAY = {
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "IO_ERROR",
    "UNAUTHENTICATED",
}


def spool_root() -> Path:
    """Return the folder of spools: ``<run root>/spool``."""
    return storage.run_root() / "spool"


def is_away(error: BaseException) -> bool:
    """Return whether an error means that the tracker is unreachable, not that it refuses."""
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in AWAY
    return isinstance(error, OSError) or type(error).__module__.startswith(
        ("requests", "urllib3", "sqlalchemy")
    )


class OperationSpool:
    """Queue of the operations of one process for one run.

    Args:
        run_id: the MLflow run.
        uri: address of the tracker, such as ``http://host:5000``.
        apply: sends one operation and raises the errors of the tracker's client.
    """

    def __init__(self, run_id: str, uri: str, apply: Callable[[Operation], None]) -> None:
        self.run_id, self.uri = run_id, uri
        self._apply = apply
        # Reentrant because send() calls flush(); the thread of system metrics writes too.
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
        """Folder of copied artifacts that wait."""
        return self.path.with_suffix("")

    def __len__(self) -> int:
        return len(self._waiting)

    def send(self, operation: Operation) -> None:
        """Send an operation now, or keep it while the tracker is unreachable."""
        with self._lock:
            # Records keep their order: while older ones wait, a new one must not overtake them.
            if not self._waiting:
                try:
                    self._apply_or_reject(operation)
                except Exception as error:
                    if not is_away(error):
                        raise
                    self._keep(operation)
                    self._away(error)
                return
            self._keep(operation)
            # Training must not wait for a dead server at every record.
            if time.monotonic() >= self._next_try:
                self.flush()

    def flush(self) -> bool:
        """Try to send all waiting records; return whether none is left."""
        with self._lock:
            sent = 0
            try:
                if self._waiting:
                    # A request to a dead server would wait for MLflow's timeout.
                    _require_listener(self.uri)
                for operation in self._waiting:
                    self._send_first(operation)
                    sent += 1
            except Exception as error:
                if not is_away(error):
                    raise
                self._away(error)
            if sent or not self._waiting:
                del self._waiting[:sent]
                self._rewrite()
                if not self._waiting:
                    self._pause = FIRST_PAUSE_S
                    console.print_note(f"the tracker answers again: {sent} records sent")
            return not self._waiting

    def adopt(self, path: Path) -> int:
        """Send the spool of an ended process; return the number of records, 0 if unreachable."""
        _, operations = read_spool(path)
        with self._lock:
            self.path, self._waiting = path, list(operations)
            return len(operations) if self.flush() else 0

    def _apply_or_reject(self, operation: Operation) -> None:
        try:
            self._apply(operation)
        except Exception as error:
            if is_away(error):
                raise
            # A tracker that refuses one record must not end a training run.
            self._reject(operation, f"the tracker refused {operation['kind']}: {error}")

    def _send_first(self, operation: Operation) -> None:
        """Send the oldest record; reject it if it alone blocks the others.

        A server error means an outage, or a record that the server can never store. The newest
        record decides: while the server accepts neither record, all records wait.
        """
        try:
            self._apply_or_reject(operation)
        except Exception as error:
            newest = self._waiting[-1]
            if operation is newest:
                raise
            for pause in DOUBT_PAUSES_S:
                try:
                    self._apply(newest)  # it is sent again in its turn, which has no effect
                except Exception:
                    raise error from None
                time.sleep(pause)
                try:
                    self._apply_or_reject(operation)
                    return
                except Exception as again:
                    error = again
            what = f"the tracker takes other records and fails at {operation['kind']}"
            self._reject(operation, f"{what}: {first_line(error)}")

    def _reject(self, operation: Operation, words: str) -> None:
        rejected = self.path.with_suffix(".rejected")
        rejected.parent.mkdir(parents=True, exist_ok=True)
        if operation["kind"] == "artifact" and Path(operation["path"]).is_relative_to(self._files):
            # The copy would be removed with the sent copies.
            source = Path(operation["path"])
            kept = self.path.with_suffix(".rejected-files") / source.relative_to(self._files)
            kept.parent.mkdir(parents=True, exist_ok=True)
            source.replace(kept)
            operation = {**operation, "path": str(kept)}
        with rejected.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(operation, ensure_ascii=False) + "\n")
        self.rejected += 1
        console.print_warning(f"{words}; it was written to {rejected} ({self.rejected} so far)")

    def _keep(self, operation: Operation) -> None:
        if operation["kind"] == "artifact" and Path(operation["path"]).is_file():
            # The file and this process may end before the tracker answers.
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
            # The first line states run and tracker for the process that sends the leftovers.
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
        # A kill in between must leave the old or the new file, not a part of one.
        with storage.atomic_write(self.path, "w") as stream:
            stream.write(json.dumps({"run_id": self.run_id, "uri": self.uri}) + "\n")
            for operation in self._waiting:
                stream.write(json.dumps(operation, ensure_ascii=False) + "\n")

    def _away(self, error: BaseException) -> None:
        if self._pause == FIRST_PAUSE_S:
            reason = first_line(error)[:160]
            console.print_warning(
                f"the tracker {self.uri} does not answer ({reason}); records wait in {self.path}"
            )
        self._next_try = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE_S)


def find_leftover_spools(uri: str) -> list[Path]:
    """Return the spools for this tracker whose process on this machine ended.

    A process of another container with this host name, or from before a restart, cannot be seen.
    Its spool is returned when it has not changed for an hour.

    A spool with an incomplete first line, after a kill or a full disk, is renamed with a warning.
    """
    found = []
    for path in sorted(spool_root().glob("*.jsonl")):
        _, _, rest = path.stem.partition(".")
        host, _, process = rest.partition(".")
        pid = process.partition("-")[0]
        try:
            # A living process sends its own records.
            if not pid.isdigit() or _may_be_alive(path, host, int(pid)):
                continue
            if _header(path)["uri"] == uri:
                found.append(path)
        except OSError:
            continue  # another process sent it, or another user owns it
        except ValueError:
            aside = path.with_suffix(".unreadable")
            path.replace(aside)
            console.print_warning(
                f"{path}: the first line, which names the tracker, is unreadable. The file was "
                f"renamed to {aside.name}"
            )
    return found


def read_spool(path: Path) -> tuple[str, list[Operation]]:
    """Return run id and operations of a spool file, without lines that a kill cut."""
    operations = []
    # Not splitlines(): texts may hold other line separators.
    for line in path.read_text(encoding="utf-8").split("\n")[1:]:
        with contextlib.suppress(json.JSONDecodeError):
            operations.append(json.loads(line))
    return _header(path)["run_id"], operations


def _header(path: Path) -> dict[str, str]:
    """Return the first line: ``run_id`` and ``uri``.

    Raises:
        ValueError: the line is missing or incomplete.
    """
    with path.open(encoding="utf-8") as stream:
        header: dict[str, str] = json.loads(stream.readline())
    if not isinstance(header, dict) or not {"run_id", "uri"} <= set(header):
        raise ValueError(f"{path}: no run and tracker in the first line")
    return header


def _require_listener(uri: str) -> None:
    """Check for a listening server: a connection fails faster than a request.

    Raises:
        OSError: no server listens.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=PROBE_S).close()


def _host() -> str:
    """Return the host name, and a short digest of the processes that this process can see."""
    view = hashlib.sha256(visible_processes().encode()).hexdigest()[:8]
    return f"{socket.gethostname().replace('.', '-')}~{view}"


def _may_be_alive(path: Path, host: str, pid: int) -> bool:
    if host == _host():
        return storage.process_is_alive(pid)
    same_name = host.rpartition("~")[0] == _host().rpartition("~")[0]
    # Other hosts cannot be checked.
    return not same_name or time.time() - path.stat().st_mtime < UNSEEN_AGE_S
