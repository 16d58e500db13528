"""Runs on Ray whose workers share a store with the driver, and no disk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import finetune
from pipelines.training import faults, worker
from pipelines.training.settings import FinetuneConfig
from skillnet_platform import remote
from skillnet_platform.errors import Terminated
from tests.integration.test_mirror import config_of, weights
from tests.object_store import ObjectStore
from tests.small_corpora import write_corpora

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data")


def apart_from_the_driver(monkeypatch: pytest.MonkeyPatch, store: ObjectStore, run: Path) -> None:
    """Ray's workers work in another folder than the driver, as on a disk of their own."""
    for name, value in store.environment.items():
        monkeypatch.setitem(worker.WORKER_ENVIRONMENT, name, value)
    monkeypatch.setitem(worker.WORKER_ENVIRONMENT, "SKILLNET_HOME", str(run.parent))
    original = worker._trainer

    def trainer(config: FinetuneConfig, mine: Path, loop: dict[str, Any], nested: Any) -> Any:
        return original(config, mine, loop | {"run": str(run), "driver_node": "another"}, nested)

    monkeypatch.setattr(worker, "_trainer", trainer)


def test_a_driver_asked_to_leave_reaches_workers_that_do_not_see_its_disk(
    object_store: ObjectStore,
    data: Path,
    run_root: Path,
    tmp_path: Path,
    ray_session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = finetune.finetune(replace(config_of(data, object_store), name="whole", run_dir=None))
    config = config_of(data, object_store, workers=1, checkpoint_every=0, threads_per_worker=1)
    apart_from_the_driver(monkeypatch, object_store, tmp_path / "worker" / "a")
    order = {"step": 5, "kind": "term", "victim": "driver"}
    monkeypatch.setenv(faults.VARIABLE, json.dumps(order))
    with pytest.raises(Terminated, match="the same command"):
        finetune.finetune(config)
    assert remote.list_folders(f"{object_store.uri}/a/checkpoints") == ["step-00000006"]
    # Another machine, and another one for the worker.
    for place in (run_root / "a", tmp_path / "worker"):
        shutil.rmtree(place)
    monkeypatch.delenv(faults.VARIABLE)
    result = finetune.finetune(config)
    assert (result["resumed"], result["step"]) == (6, 12)
    assert weights(Path(result["model"])) == weights(Path(whole["model"]))
