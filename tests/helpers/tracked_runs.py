"""Runs in a tracker, for tests of what is recorded there."""

from pathlib import Path
from typing import Any

from skillnet_platform.tracking import Tracker, TrackingConfig, backend, champion, registry


def where(experiment: str = "tests", uri: str | None = None) -> TrackingConfig:
    """A place to record to: by default the run root's."""
    return TrackingConfig(uri=uri, experiment=experiment, system_metrics=False)


def run_of(tracker: Tracker) -> Any:
    """The run as the tracker has it."""
    return backend.create_client(tracker.uri).get_run(tracker.run_id)


def artifacts_of(tracker: Tracker) -> Path:
    """The folder of the run's artifacts on this machine."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    location = run_of(tracker).info.artifact_uri
    return Path(get_artifact_repository(location, str(tracker.uri)).artifact_dir)


def history(tracker: Tracker, name: str) -> list[tuple[int, float]]:
    """(Step, value) of each point of a metric."""
    points = backend.create_client(tracker.uri).get_metric_history(tracker.run_id, name)
    return sorted((point.step, point.value) for point in points)


def find_champion(name: str = champion.MODEL_NAME, uri: str | None = None) -> Any:
    """The champion of a registered model, or None."""
    return champion.champion_of(backend.create_client(backend.resolve_uri(uri)), name)


def load_registered(model: str, uri: str | None = None) -> Any:
    """A registered model as MLflow loads it."""
    import mlflow

    return mlflow.pyfunc.load_model(str(registry.resolve_registered(model, uri).path))
