"""Runs in a store: on any machine they go on to the bit, and no fault of the store loses any."""

import json
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines import finetune
from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import FinetuneConfig, StorageConfig
from pipelines.training.loop import preemption
from pipelines.training.loop import run as training_run
from pipelines.training.loop.ray_train import fit
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.loop.worker import run_worker
from pipelines.training.runs import checkpoints, model_source
from pipelines.training.runs.mirror import CheckpointUploads, RunMirror
from skillnet_platform.errors import TerminatedError, UserError
from skillnet_platform.ray_internals.errors import WorkerGroupResize
from skillnet_platform.storage import directories
from skillnet_platform.storage.cache import GB
from skillnet_platform.storage.retry import StoreUnavailableError
from skillnet_platform.tracking import backend
from tests.chaos.fault_injection import Fault, FaultInjection, finetune_with_faults
from tests.helpers.object_store import BUCKET, ObjectStore
from tests.helpers.small_corpora import small_config, write_corpora

pytestmark = pytest.mark.integration


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is away is noticed soon."""
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "1")
    monkeypatch.setattr("pipelines.training.runs.mirror.LONGEST_PAUSE_S", 1.0)


def config_of(data: Path, store: ObjectStore | None = None, **training: object) -> FinetuneConfig:
    config = small_config(
        data, **({"steps": 12, "checkpoint_every": 4, "keep_checkpoints": 2} | training)
    )
    tasks = {name: config.tasks[name] for name in ("text_classification", "text_to_image")}
    model = replace(config.model, tasks={name: config.model.tasks[name] for name in tasks})
    return replace(config, name="a", run_dir=store and store.uri, tasks=tasks, model=model)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run on a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(tmp_path_factory.mktemp("whole")))
        return Path(finetune.finetune(replace(config_of(data), name="whole"))["run"])


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_run_lies_in_the_store(object_store: ObjectStore, data: Path, run_root: Path) -> None:
    result = finetune.finetune(config_of(data, object_store))
    assert result["mirror"] == f"{object_store.uri}/a"
    names = {entry.name for entry in directories.list_files(f"{object_store.uri}/a")}
    assert {"config.yaml", "run.json", "progress.jsonl", "trained.json", "result.json"} <= names
    assert {"model/manifest.json", "checkpoints/step-00000012/manifest.json"} <= names
    assert len(directories.list_folders(f"{object_store.uri}/a/checkpoints")) <= 2
    # Another machine: nothing of it on the disk. The name gives the result, and the model is found.
    here = Path(result["run"])
    model = weights(here / "model")
    shutil.rmtree(run_root)
    again = finetune.finetune(config_of(data, object_store))
    assert again["step"] == 12
    assert again["run"] == str(here)
    assert weights(Path(again["model"])) == model
    for given in ("", "/model", "/checkpoints/step-00000012"):
        source = model_source.resolve_model(f"{object_store.uri}/a{given}")
        assert source.settings["name"] == "a"
        assert model_source.load_source_model(source).config.dim == 16
    assert source.steps == 12
    with pytest.raises(UserError, match="holds no complete model"):
        model_source.resolve_model(f"{object_store.uri}/b")


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    from pipelines.training.loop import loop, worker

    def train(*args: object, **more: object) -> object:
        done = loop.train_model(*args, **(more | {"stop_at": step}))  # type: ignore[arg-type]
        if step is not None:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(worker, "train_model", train)


def run_until(monkeypatch: pytest.MonkeyPatch, config: FinetuneConfig, step: int | None) -> None:
    """Train until a step as a process would that is then gone, its uploads done."""
    stop_at(monkeypatch, step)
    made: list[CheckpointUploads] = []
    original = CheckpointUploads.__init__

    def remembered(self: CheckpointUploads, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointUploads, "__init__", remembered)
        if step is None:
            finetune.finetune(config)
        else:
            with pytest.raises(KeyboardInterrupt):
                finetune.finetune(config)
            assert made[0].close(60) is None


def test_an_empty_disk_resumes_to_the_bit(
    object_store: ObjectStore,
    data: Path,
    whole: Path,
    run_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(data, object_store)
    for step in (5, 9):
        run_until(monkeypatch, config, step)
        shutil.rmtree(run_root / "a")
    # What a dead upload left, and a newer one with a flipped bit, are passed over.
    place = f"{object_store.uri}/a/checkpoints"
    directories.write_bytes(f"{place}/step-00000011/shared.safetensors", b"half")
    good = directories.read_bytes(f"{place}/step-00000009/shared.safetensors")
    directories.write_bytes(
        f"{place}/step-00000009/shared.safetensors", good[:-1] + bytes([good[-1] ^ 1])
    )
    stop_at(monkeypatch, None)
    result = finetune.finetune(config)
    # Of step 8 the upload may have been overtaken by that of step 9.
    assert result["resumed"] in (5, 8)
    assert weights(Path(result["model"])) == weights(whole / "model")
    left = directories.list_folders(place)
    assert left[-1] == "step-00000012"
    assert not {"step-00000009", "step-00000011"} & set(left)


@pytest.mark.long
def test_training_outlives_the_store(
    object_store: ObjectStore,
    data: Path,
    whole: Path,
    run_root: Path,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The store goes after the first steps and comes back when training is over."""
    config = config_of(data, object_store)
    original = RunMirror.check_writable

    def check_writable(self: RunMirror, known: bool) -> None:
        original(self, known)
        object_store.door.shut()

    opener = threading.Timer(3.0, object_store.door.unshut)
    deliver = finetune.upload_results

    def deliver_later(*given: Any) -> None:
        opener.start()
        deliver(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunMirror, "check_writable", check_writable)
        patch.setattr(finetune, "upload_results", deliver_later)
        result = finetune.finetune(config)
    opener.join()
    assert result["step"] == 12
    said = capsys.readouterr().err
    assert "step-00000004 is not yet in" in said
    assert "Training continues" in said
    assert directories.object_exists(f"{object_store.uri}/a/result.json")
    there = f"{object_store.uri}/a"
    last = "checkpoints/step-00000012"
    for name, expected in (("model", whole / "model"), (last, whole / last)):
        kept = directories.get_directory(f"{there}/{name}", tmp_path / name)
        assert weights(kept) == weights(expected)


@pytest.mark.slow("test_mirror.py::test_training_outlives_the_store")
def test_a_store_that_never_comes_back_loses_nothing(
    data: Path, run_root: Path, quick: None, tmp_path: Path
) -> None:
    """The server is killed with all that it held; another one gets everything."""
    from tests.helpers.object_store import in_environment

    server = ObjectStore()
    try:
        with in_environment({**server.environment, "SKILLNET_STORE_PATIENCE": "1"}):
            config = config_of(data, server)
            original = RunMirror.check_writable

            def check_writable(self: RunMirror, known: bool) -> None:
                original(self, known)
                server.kill()

            with (
                pytest.MonkeyPatch.context() as patch,
                pytest.raises(
                    StoreUnavailableError,
                    match=r"finished and complete in .*lacks its last checkpoint .*and its results",
                ),
            ):
                patch.setattr(RunMirror, "check_writable", check_writable)
                patch.setattr("pipelines.training.runs.mirror.END_PATIENCE_S", 1.0)
                finetune.finetune(config)
            assert checkpoints.find_newest(run_root / "a" / "checkpoints").step == 12  # type: ignore[union-attr]
            server.start()
            result = finetune.finetune(config)
            there = f"s3://{BUCKET}/a"
            assert (
                directories.read_bytes(f"{there}/result.json")
                == (run_root / "a" / "result.json").read_bytes()
            )
            assert directories.is_committed(f"{there}/checkpoints/step-00000012")
            kept = directories.get_directory(f"{there}/model", tmp_path / "model")
            assert weights(kept) == weights(Path(result["model"]))
    finally:
        server.close()


def test_mistakes_are_found_before_the_work(
    object_store: ObjectStore, data: Path, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data, object_store)
    with pytest.raises(UserError, match="no bucket 'elsewhere'"):
        finetune.finetune(replace(config, run_dir="s3://elsewhere/runs"))
    with pytest.raises(UserError, match="give only one of them"):
        finetune.finetune(replace(config, storage=StorageConfig(mirror="s3://other/runs")))
    object_store.door.shut()
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "1")
    try:
        with pytest.raises(StoreUnavailableError, match="did not answer"):
            finetune.finetune(config)
    finally:
        object_store.door.unshut()
    assert not (run_root / "a").exists()
    with pytest.raises(ValueError, match="must be a URI"):
        StorageConfig(mirror="/a/folder")


def test_a_worker_apart_sends_its_model_to_the_driver(
    object_store: ObjectStore,
    data: Path,
    run_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two folders stand for two machines: the worker's checkpoints and model reach the driver's."""
    config = resolve_run(config_of(data, object_store)).config
    theirs, mine = tmp_path / "worker" / "a", run_root / "a"
    monkeypatch.setattr("pipelines.training.loop.reporter.PROGRESS_NOTE_S", 0.0)
    run_worker(ResolvedRun(config, theirs), is_remote=True)
    # The driver does not see its progress file; Ray passes on what it says.
    assert "training: step 5 of 12, " in capsys.readouterr().err
    driver = RunMirror(f"{object_store.uri}/a", mine)
    driver.download_trained()
    assert weights(mine / "model") == weights(theirs / "model")
    assert load_file(mine / "model" / "shared.safetensors")
    found = driver.download_newest()
    assert found is not None
    assert found.step == 12


def test_a_host_that_leaves_an_elastic_run_sends_its_checkpoint_before_it_goes(
    object_store: ObjectStore,
    data: Path,
    whole: Path,
    run_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two folders stand for two machines: another one resumes from the last step, bitwise."""
    config = resolve_run(config_of(data, object_store)).config
    callbacks = [FaultInjection([Fault(step=5, kind="term")])]
    before = signal.getsignal(signal.SIGTERM)
    preemption.listen_in_worker()
    try:
        with pytest.raises(WorkerGroupResize) as reported:
            one = ResolvedRun(config, tmp_path / "one" / "a")
            run_worker(one, is_remote=True, node_id="one", callbacks=callbacks)
    finally:
        preemption.listen_in_worker()
        signal.signal(signal.SIGTERM, before)
    assert reported.value.leaving == ["one"]
    assert directories.is_committed(f"{object_store.uri}/a/checkpoints/step-00000006")
    shutil.rmtree(tmp_path / "one")
    run_worker(ResolvedRun(config, tmp_path / "another" / "a"), is_remote=True, node_id="another")
    trained = json.loads((tmp_path / "another" / "a" / "trained.json").read_text())
    assert (trained["resumed"], trained["step"]) == (6, 12)
    assert weights(tmp_path / "another" / "a" / "model") == weights(whole / "model")


# -- workers on Ray that share a store with the driver, and no disk ------------------------------

#: Seconds without a store: the steps that need none take less.
AWAY_S = 5.0


@pytest.fixture
def many_shards(tmp_path: Path) -> Path:
    return write_corpora(tmp_path / "data", rows=120, shards=12)


def apart_from_the_driver(monkeypatch: pytest.MonkeyPatch, store: ObjectStore, run: Path) -> None:
    """Ray's workers work in another folder than the driver, as on a disk of their own."""
    for name, value in store.environment.items():
        monkeypatch.setitem(fit.WORKER_ENVIRONMENT, name, value)
    monkeypatch.setitem(fit.WORKER_ENVIRONMENT, "SKILLNET_HOME", str(run.parent))
    # One worker on this machine needs no Ray.
    monkeypatch.setattr(training_run, "trains_in_process", lambda training: False)
    original = fit._trainer

    def trainer(config: FinetuneConfig, mine: Path, loop: dict[str, Any], *more: Any) -> Any:
        return original(config, mine, loop | {"run": str(run), "driver_node": "another"}, *more)

    monkeypatch.setattr(fit, "_trainer", trainer)


@pytest.mark.slow("test_mirror.py::test_a_worker_apart_sends_its_model_to_the_driver")
def test_a_driver_asked_to_leave_reaches_workers_that_do_not_see_its_disk(
    object_store: ObjectStore,
    data: Path,
    whole: Path,
    run_root: Path,
    tmp_path: Path,
    ray_session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    assert weights(Path(result["model"])) == weights(whole / "model")


@pytest.mark.slow("test_mirror.py::test_training_outlives_the_store")
def test_a_store_that_is_away_while_workers_read_from_it(
    object_store: ObjectStore,
    many_shards: Path,
    run_root: Path,
    tmp_path: Path,
    ray_session: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shards of later windows are fetched when their turn comes; by then the store is gone."""
    data = many_shards
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
