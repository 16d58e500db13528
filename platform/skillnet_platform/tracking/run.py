"""Runs in MLflow: who opens and ends them, what they record, and where.

The driver calls ``start``; it alone opens and ends the run. Rank 0, in a worker, writes to it
through a :class:`Tracker` of its own. MLflow is imported on first use, not with this module.

``run.json`` names the MLflow run of a folder. The file gets a random key before the MLflow run is
created, and the run carries the key as a tag. A command that was killed between the two steps finds
its run by the key. Runs whose process was killed are found by a process tag and closed.
"""

import contextlib
import getpass
import json
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skillnet_platform import config as configuration
from skillnet_platform import console, signals
from skillnet_platform.config import fixed_field
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.secret_uri import SecretUri, redact_secrets
from skillnet_platform.storage import read_record, write_json
from skillnet_platform.storage.locks import has_ended, this_process
from skillnet_platform.terminal_text import shorten_text
from skillnet_platform.tracking import backend, source_commit, spool

LONGEST_PARAMETER = 6000
LONGEST_TAG = 5000
#: Seconds that the end of a run waits for a tracker that does not answer.
END_PATIENCE_S = 20.0
#: Seconds between two measurements of the machine.
SYSTEM_METRICS_S = 10.0
#: Between two tries of :meth:`Tracker.settle`.
SETTLE_PAUSE_S = 2.0
#: MLflow shows it beside the name, and keeps at most 36; the whole one is in the profile.
DATASET_DIGEST = 12
#: Tag of a run that its opener must find again after a kill.
KEY_TAG = "skillnet.key"
#: Tag of a run that ended without success: the cause.
FAILURE_TAG = "failure"
#: MLflow writes an artifact under such a name first, and hides these files.
_PARTIAL_UPLOADS = ".artifact.uploading.*"
#: Advice about a ``run.json`` that names no usable run.
REMEDY = "remove that file, and the same command records into a new run"


@dataclass
class TrackingConfig:
    """Where runs are recorded.

    Args:
        uri: the MLflow tracker; by default MLFLOW_TRACKING_URI, else a sqlite file in the run root.
        experiment: the name under which runs are grouped.
        register: whether the finished model becomes a version in the registry, if all of its tasks
            are trained.
        registered_model: name of the registered model; by default the experiment, followed by the
            system if that is not skillnet.
        loggers: names of entry points ``skillnet.loggers`` that get the metrics beside MLflow.
        system_metrics: whether CPU, memory, disk and GPU are recorded along.

    A password in ``uri`` is kept in memory only: no file and no message shows it.
    """

    uri: str | None = None
    experiment: str = "skillnet"
    register: bool = True
    registered_model: str | None = None
    loggers: list[str] = field(default_factory=list)
    system_metrics: bool = fixed_field(True)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, SecretUri(value) if name == "uri" and value else value)


class Tracker:
    """Writer to one MLflow run. An unreachable tracker raises nothing: records wait in the spool.

    Args:
        run_id: MLflow's identifier of the MLflow run.
        uri: address of the tracker, such as ``http://host:5000``.
        experiment_id: MLflow's identifier of the experiment, for links.
    """

    def __init__(self, run_id: str, uri: str, experiment_id: str = "") -> None:
        self.run_id, self.uri, self.experiment_id = run_id, SecretUri(uri), experiment_id
        client = backend.create_client(uri)
        self._spool = spool.OperationSpool(
            run_id, uri, lambda op: spool.apply_operation(client, run_id, op)
        )

    @property
    def link(self) -> str:
        """Return the URL of the run's page for an HTTP tracker, else the run's id."""
        if self.uri.startswith("http"):
            page = f"experiments/{self.experiment_id}/runs/{self.run_id}"
            return f"{self.uri.address}/#/{page}?{backend.TRAINING_VIEW}"
        return self.run_id

    def metrics(
        self, values: Mapping[str, float], step: int = 0, time_ms: int | None = None
    ) -> None:
        """Log metrics at a step, named ``task/metric``, such as ``text_to_image/loss``.

        Args:
            values: name -> value.
            step: training step.
            time_ms: Unix time of the measurement in ms, by default now. The same values at the same
                time are stored once, so a resumed process may log them again.
        """
        # The record may wait in the spool, so it carries the time of the measurement.
        when = int(time.time() * 1000) if time_ms is None else time_ms
        numbers = {name: float(value) for name, value in values.items()}
        self._spool.send({"kind": "metrics", "values": numbers, "step": int(step), "time": when})

    def params(self, resolved: Any) -> None:
        """Log the resolved configuration: flat parameters, and the file ``config.yaml``.

        MLflow's parameters cannot change: a resumed run keeps the first values, and changed values
        become tags named ``changed.<key>``.
        """
        flat = configuration.flatten_tree(configuration.to_dict(resolved))
        self.constants(flat)
        self.text(configuration.to_yaml(resolved), "config.yaml")

    def constants(self, values: Mapping[str, Any]) -> None:
        """Log values that a run measures once, as parameters: a metric would be a chart.

        Args:
            values: name -> value.
        """
        short = {key: _short(value, LONGEST_PARAMETER) for key, value in values.items()}
        self._spool.send({"kind": "params", "values": short})

    def inputs(self, manifests: Mapping[str, Mapping[str, Any]]) -> None:
        """Log corpora as dataset inputs.

        Args:
            manifests: corpus name -> its manifest (``digest``, ``splits``, ``schema`` are read).
        """
        for name, manifest in manifests.items():
            digest = str(manifest["digest"])
            splits = manifest.get("splits", {})
            rows = {split: body.get("rows") for split, body in splits.items()}
            profile = {"rows": rows, "digest": digest, "quarantine": manifest.get("quarantine", {})}
            self._spool.send(
                {
                    "kind": "input",
                    "name": name,
                    "digest": digest[:DATASET_DIGEST],
                    "source_type": "local",
                    "source": json.dumps({"corpus": name, "sources": manifest.get("sources", [])}),
                    "schema": json.dumps(manifest.get("schema", {})),
                    "profile": json.dumps(profile),
                    "context": "training",
                }
            )
            # MLflow shows a shortened digest of an input; the tag has all of it.
            self.tags({f"corpus.{name}": digest})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces an earlier value."""
        short = {key: _short(value, LONGEST_TAG) for key, value in values.items()}
        self._spool.send({"kind": "tags", "values": short})

    def note(self, markdown: str) -> None:
        """Set the description that MLflow shows at the head of the run's page."""
        self.tags({"mlflow.note.content": markdown})

    def figure(self, figure: Any, name: str) -> None:
        """Log a matplotlib figure as the artifact ``name`` (``plots/loss.png``)."""
        with self._new_artifact(name) as path:
            figure.savefig(path, dpi=120, bbox_inches="tight")

    def text(self, text: str, name: str) -> None:
        """Log a text as the artifact ``name``."""
        with self._new_artifact(name) as path:
            path.write_text(text, encoding="utf-8")

    def dict(self, obj: Any, name: str) -> None:
        """Log dataclasses, mappings and lists as the JSON artifact ``name``."""
        with self._new_artifact(name) as path:
            text = json.dumps(console.to_json_types(obj), ensure_ascii=False, indent=2)
            path.write_text(text, encoding="utf-8")

    def artifact(self, path: str | os.PathLike[str], folder: str = "") -> None:
        """Log a file or directory below ``folder``."""
        local = str(Path(path).absolute())
        self._spool.send({"kind": "artifact", "path": local, "folder": folder})

    def end(self, status: str = "FINISHED") -> None:
        """End the run with FINISHED, FAILED or KILLED. Only the driver calls it."""
        now = int(time.time() * 1000)
        self._spool.send({"kind": "end", "status": status, "time": now})
        self.flush()

    def flush(self) -> bool:
        """Send waiting records; return whether none is left. Rank 0 calls it before it ends."""
        return self._spool.flush() if len(self._spool) else True

    def settle(self, patience: float) -> bool:
        """Send waiting records with retries; return whether none is left.

        For a process on a node where no later process may send its spool.

        Args:
            patience: seconds of retries.
        """
        end = time.monotonic() + patience
        while not self.flush():
            if time.monotonic() >= end:
                return False
            time.sleep(min(SETTLE_PAUSE_S, patience))
        return True

    @contextlib.contextmanager
    def _new_artifact(self, name: str) -> Iterator[Path]:
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="skillnet-") as place:
            path = Path(place) / file
            yield path
            self.artifact(path, folder)


@contextlib.contextmanager
def start_run(
    name: str,
    config: Any = None,
    tracking: TrackingConfig | None = None,
    tags: Mapping[str, Any] | None = None,
    description: str = "",
    parent: str | None = None,
    key: str | None = None,
    record: Path | None = None,
) -> Iterator[Tracker]:
    """Open an MLflow run for a block, on the driver.

    The run ends as FINISHED, as FAILED with the cause in the tag ``failure`` after an exception, or
    as KILLED after an interrupt or a stop signal. The next call closes a run that a killed process
    left RUNNING, and sends the records in its spool.

    Args:
        name: folder of the run below the run root.
        config: resolved configuration to log. ``None`` logs none.
        tracking: tracker and experiment; by default ``TrackingConfig()``.
        tags: further tags.
        description: markdown for the head of the run's page.
        parent: id of the parent run (a sweep).
        key: identifies the run. A run that an earlier call with this key opened is resumed.
        record: ``run.json`` of the run: the run that it names is resumed, or it is written.

    Raises:
        UserError: no tracker answers at the URI, the URI is a file store, or the run to resume does
            not exist.
    """
    where = tracking or TrackingConfig()
    place = backend.setup_backend(where.uri, where.experiment)
    client = backend.create_client(place.uri)
    send_leftover_spools(place.uri)
    # A killed process could not end its run, which would stay RUNNING.
    close_abandoned(client, place.experiment_id)
    tracker = _open_run(client, place.uri, place.experiment_id, name, parent, key, record)
    status = "FINISHED"
    watch: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if where.system_metrics:
        # Sent through the tracker, so that measurements wait in the spool during an outage.
        watch = _system_metrics(tracker.run_id, place.uri, tracker.metrics)
    try:
        with signals.terminate_as_interrupt(), watch, backend.share_secret(place.uri):
            if tags:
                tracker.tags(tags)
            if description:
                tracker.note(description)
            if config is not None:
                tracker.params(config)
            yield tracker
    except (KeyboardInterrupt, GeneratorExit):
        status = "KILLED"
        raise
    except SystemExit as exit_request:
        status = "FINISHED" if exit_request.code in (0, None) else "FAILED"
        raise
    except BaseException as error:
        status = "FAILED"
        tracker.tags({FAILURE_TAG: redact_secrets(f"{type(error).__name__}: {error}")})
        raise
    finally:
        tracker.end(status)
        # A busy tracker gets a little time: the next run may start weeks later.
        tracker.settle(0.0 if status == "KILLED" else END_PATIENCE_S)
        if len(tracker._spool) == 0:
            send_leftover_spools(place.uri)  # records of the run's workers


@contextlib.contextmanager
def _system_metrics(
    run_id: str,
    uri: SecretUri,
    publish: Callable[[Mapping[str, float], int], None],
) -> Iterator[None]:
    """Publish system metrics named ``system/…`` during a block.

    MLflow's monitors collect them. MLflow's own thread would stop at the first lost request.

    Args:
        run_id: MLflow run.
        uri: tracker of the run.
        publish: sends metrics and their step.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, tracking_uri=uri.reveal())
    stop = threading.Event()

    def watch() -> None:
        step, ended = 0, False
        while not ended:
            monitor.collect_metrics()
            # The last, shorter interval is published too.
            ended = stop.wait(SYSTEM_METRICS_S)
            values = monitor.aggregate_metrics()
            try:
                publish({f"system/{name}": value for name, value in values.items()}, step)
            except UserError as error:
                # The run itself meets the full disk next, and ends with the message.
                console.print_warning(f"system metrics end: {error}")
                return
            for each in monitor.monitors:
                each.clear_metrics()
            step += 1

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        # With a limit: a stuck measurement must not delay the end of the run.
        thread.join(timeout=SYSTEM_METRICS_S)


def start_child_run(
    parent: Tracker,
    name: str,
    config: Any = None,
    tags: Mapping[str, Any] | None = None,
    record: Path | None = None,
) -> Tracker:
    """Open a run nested in another run, on the driver, which must call ``end``.

    If the driver is killed, the next :func:`start_run` closes the run.

    Args:
        parent: tracker of the parent run.
        name: folder of the run below the run root.
        config: resolved configuration to log. ``None`` logs none.
        tags: further tags.
        record: ``run.json`` of the run, see :func:`start_run`.

    Raises:
        MlflowException: the tracker is unreachable (see ``spool.is_away``).
        UserError: the run to resume does not exist.
    """
    client = backend.create_client(parent.uri)
    tracker = _open_run(client, parent.uri, parent.experiment_id, name, parent.run_id, None, record)
    if tags:
        tracker.tags(tags)
    if config is not None:
        tracker.params(config)
    return tracker


def _open_run(
    client: Any,
    uri: str,
    experiment_id: str,
    name: str,
    parent: str | None,
    key: str | None,
    record: Path | None,
) -> Tracker:
    """Resume the run of a record or of a key; create and record it if there is none."""
    run_id, key = (None, key) if record is None else reserve_run(record)
    if run_id is None and key:
        query = f"tags.`{KEY_TAG}` = '{key}'"
        found = client.search_runs([experiment_id], query, max_results=1)
        run_id = found[0].info.run_id if found else None
    if run_id is None:
        run = client.create_run(experiment_id, run_name=name, tags=_first_tags(parent, key))
        run_id = str(run.info.run_id)
    else:
        _resume(client, run_id, uri, record)
    if record is not None:
        write_run_id(record, run_id, uri)
    return Tracker(run_id, uri, experiment_id)


def _resume(client: Any, run_id: str, uri: str, record: Path | None) -> None:
    from mlflow.exceptions import MlflowException

    try:
        reopen_run(client, run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        source = f"{record}: " if record else ""
        raise UserError(
            f"{source}the tracker {uri} cannot resume the run {run_id}: {first_line(error)}; "
            f"{REMEDY}"
        ) from None


def send_leftover_spools(uri: str) -> int:
    """Send the spools of ended processes for this tracker; return the number of records."""
    sent = 0
    for path in spool.find_leftover_spools(uri):
        sent += Tracker(path.name.partition(".")[0], uri)._spool.adopt(path)
    return sent


def _first_tags(parent: str | None, key: str | None = None) -> dict[str, str]:
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": redact_secrets(" ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])),
        "mlflow.source.type": "LOCAL",
        backend.PROCESS_TAG: this_process(),
        **source_commit.commit_tags(),
    }
    if parent:
        tags["mlflow.parentRunId"] = parent
    if key:
        tags[KEY_TAG] = key
    return tags


def _short(value: Any, longest: int) -> str:
    text = (
        str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    )
    return shorten_text(text, longest)


def close_abandoned(client: Any, experiment_id: str) -> int:
    """Close as KILLED the RUNNING runs whose process on this machine ended; return their number.

    Args:
        client: ``MlflowClient``.
        experiment_id: experiment to search.
    """
    closed = 0
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        if has_ended(run.data.tags.get(backend.PROCESS_TAG, "")):
            client.set_tag(run.info.run_id, FAILURE_TAG, "the process was killed")
            client.set_terminated(run.info.run_id, "KILLED")
            closed += 1
    return closed


def reopen_run(client: Any, run_id: str) -> None:
    """Set a run to RUNNING for this process, and remove the cause of its earlier end.

    Args:
        client: ``MlflowClient``.
        run_id: MLflow's identifier of the run.
    """
    client.update_run(run_id, status="RUNNING")
    # The old tag names an ended process, so the next start would close this run.
    client.set_tag(run_id, backend.PROCESS_TAG, this_process())
    # Otherwise a run that finishes after a kill would still show the kill as its failure.
    run = client.get_run(run_id)
    if FAILURE_TAG in run.data.tags:
        client.delete_tag(run_id, FAILURE_TAG)
    _remove_partial_uploads(run.info.artifact_uri, client.tracking_uri)


def _remove_partial_uploads(artifact_uri: str, tracking_uri: str) -> None:
    """Remove the files that a killed process began to store as artifacts of a run.

    Only a folder of this machine has such files. The run belongs to this process, so no other
    process is storing one.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    folder = get_artifact_repository(artifact_uri, tracking_uri=tracking_uri)
    if isinstance(folder, LocalArtifactRepository):
        for path in Path(folder.artifact_dir).rglob(_PARTIAL_UPLOADS):
            path.unlink(missing_ok=True)


def read_run_id(path: Path) -> str | None:
    """Return the id of the MLflow run in a ``run.json``; None without a file or a run.

    Raises:
        UserError: the file is damaged.
    """
    return _read_record(path)[0] if path.is_file() else None


def reserve_run(path: Path) -> tuple[str | None, str]:
    """Return the id of the recorded run, if it has one, and the key to find or create it with.

    Args:
        path: location of ``run.json``; written if it is missing.

    Raises:
        UserError: the file is damaged.
    """
    if path.is_file():
        return _read_record(path)
    key = uuid.uuid4().hex
    write_json(path, {"run_id": None, "key": key})
    return None, key


def write_run_id(path: Path, run_id: str, uri: str) -> None:
    """Record the MLflow run of a folder.

    Args:
        path: location of ``run.json``, see :func:`reserve_run`.
        run_id: MLflow's identifier of the run.
        uri: address of the tracker, such as ``http://host:5000``.
    """
    write_json(path, {"run_id": run_id, "key": _read_record(path)[1], "uri": str(uri)})


def _read_record(path: Path) -> tuple[str | None, str]:
    record = read_record(path, {"run_id": (str, type(None))}, REMEDY)
    run_id, key = record.get("run_id"), record.get("key", "")
    if run_id == "" or not isinstance(key, str) or not (run_id or key):
        raise UserError(f"{path} is damaged: it names no MLflow run; {REMEDY}")
    return run_id, key
