"""Runs on Ray whose workers share a store with the driver, and no disk."""

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import finetune
from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.ray_train import fit
from skillnet_platform.errors import TerminatedError
from skillnet_platform.storage import directories
from skillnet_platform.storage.cache import GB
from skillnet_platform.tracking import backend
from tests.chaos.fault_injection import finetune_with_faults
from tests.helpers.object_store import ObjectStore
from tests.helpers.small_corpora import write_corpora
from tests.integration.test_mirror import config_of, weights

pytestmark = pytest.mark.integration
#: Seconds without a store: the steps that need none take less.
AWAY_S = 5.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", rows=120, shards=12)


def apart_from_the_driver(monkeypatch: pytest.MonkeyPatch, store: ObjectStore, run: Path) -> None:
    """Ray's workers work in another folder than the driver, as on a disk of their own."""
    for name, value in store.environment.items():
        monkeypatch.setitem(fit.WORKER_ENVIRONMENT, name, value)
    monkeypatch.setitem(fit.WORKER_ENVIRONMENT, "SKILLNET_HOME", str(run.parent))
    original = fit._trainer

    def trainer(config: FinetuneConfig, mine: Path, loop: dict[str, Any], *more: Any) -> Any:
        return original(config, mine, loop | {"run": str(run), "driver_node": "another"}, *more)

    monkeypatch.setattr(fit, "_trainer", trainer)


@pytest.mark.slow("test_mirror.py::test_a_worker_apart_sends_its_model_to_the_driver")
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
    config = replace(config, evaluate=True, tracking=replace(config.tracking, register=False))
    apart_from_the_driver(monkeypatch, object_store, tmp_path / "worker" / "a")
    order = {"step": 5, "kind": "term", "victim": "driver"}
    said = rf"ended by SIGTERM after step 6 of 12, .* the same command with --name {config.name}"
    with pytest.raises(TerminatedError, match=said):
        finetune_with_faults(config, order)
    assert directories.list_folders(f"{object_store.uri}/a/checkpoints") == ["step-00000006"]
    run_id = json.loads((run_root / "a" / "run.json").read_text(encoding="utf-8"))["run_id"]
    client = backend.create_client(backend.resolve_uri(None))
    assert client.get_run(run_id).info.status == "KILLED"
    # Another machine, and another one for the worker.
    for place in (run_root / "a", tmp_path / "worker"):
        shutil.rmtree(place)
    result = finetune.finetune(config)
    assert (result["resumed"], result["step"]) == (6, 12)
    # The worker has evaluated, and sent its tables with the model.
    assert {row["task"] for row in result["evaluation"]} == set(config.tasks)
    assert (run_root / "a" / "outcomes.parquet").is_file()
    assert weights(Path(result["model"])) == weights(Path(whole["model"]))


@pytest.mark.slow("test_mirror.py::test_training_outlives_the_store")
def test_a_store_that_is_away_while_workers_read_from_it(
    object_store: ObjectStore,
    data: Path,
    run_root: Path,
    tmp_path: Path,
    ray_session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shards of later windows are fetched when their turn comes; by then the store is gone."""
    shard = max(entry["bytes"] for entry in open_corpus(data / "drawings").splits["train"].shards)
    settings = {"steps": 30, "checkpoint_every": 10, "shuffle_gb": 2.1 * shard / GB}
    alone = replace(config_of(data, object_store, **settings), name="whole", run_dir=None)
    whole = finetune.finetune(alone)
    for name in ("headings", "drawings"):
        directories.put_directory(data / name, f"{object_store.uri}/corpora/{name}")
    config = config_of(data, object_store, **settings, workers=1, threads_per_worker=1)
    config = replace(config, data=f"{object_store.uri}/corpora")
    run = tmp_path / "worker" / "a"
    apart_from_the_driver(monkeypatch, object_store, run)
    held = run / "faults" / "0-hold-2"
    shards: list[int] = []
    over = threading.Event()

    def fetched() -> int:
        return len(
            [path for path in (tmp_path / "worker/cache/shards").rglob("*") if path.is_file()]
        )

    def take_the_store_away() -> None:
        while not held.exists():
            if over.wait(0.05):
                return
        object_store.door.shut()
        held.unlink()
        time.sleep(AWAY_S)
        shards.append(fetched())
        object_store.door.unshut()

    thread = threading.Thread(target=take_the_store_away, daemon=True)
    thread.start()
    try:
        result = finetune_with_faults(config, {"step": 2, "kind": "hold"})
    finally:
        over.set()
        thread.join()
    assert shards[0] < fetched(), "the rest came when the store was back"
    assert (result["resumed"], result["step"]) == (0, 30), "nothing was started again"
    assert weights(Path(result["model"])) == weights(Path(whole["model"]))
