"""Writes of a run to its tracker, as records, and their transmission."""

from pathlib import Path
from typing import Any

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
