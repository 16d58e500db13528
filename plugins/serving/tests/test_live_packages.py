"""A running server takes packages of skills: no request is lost, and no old answer changes."""

import asyncio
import base64
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import skills as commands
from pipelines.serving.inputs import InputRow, PredictionItem
from pipelines.training.runs.bundle_manifest import write_sealed
from skillnet.serialization import describe_files, load_tensors, read_manifest, save_tensors
from skillnet_files.commit import commit_directory, make_scratch_directory
from skillnet_serving.retrieval.corpus_search import CorpusSearch
from skillnet_serving.server import model_replica
from skillnet_serving.server.config import ServeConfig, ServerLimits
from skillnet_serving.server.model_replica import ModelReplica
from skillnet_serving.server.request_rows import PredictionRequest
from skillnet_serving.server.served_model import ServedModel, read_change_ns
from tests.helpers.file_forms import draw_png, encode_form
from tests.helpers.local_server import Service, run_service
from tests.helpers.served_place import ServedPlace
from tests.helpers.waiting import wait_until

LIMITS = ServerLimits(max_bytes=200_000, max_rows=3, max_requests=16, timeout_s=60.0)
IMAGE = {"file": base64.b64encode(draw_png()).decode(), "name": "a.png"}
#: Requests to old tasks, of each kind that a server answers.
OLD = (
    ("/v1/predict", {"rows": [{"text": "文学研究"}]}),
    ("/v1/predict", {"rows": [{**IMAGE, "task": "text_to_image"}], "embeddings": True}),
    ("/v1/search", {"query": "红色的心", "task": "text_to_image"}),
)
NEW = ("/v1/predict", {"rows": [{**IMAGE, "task": "shape"}]})
ROUNDS = 4


@pytest.fixture
def model(place: ServedPlace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.bundle, tmp_path / "model"))


@pytest.fixture
def replica(
    place: ServedPlace, model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModelReplica]:
    monkeypatch.setattr(model_replica, "LOOK_S", 0.01)
    made = ModelReplica(ServeConfig(str(model), str(place.data)))
    wait_until(lambda: made.describe()["ready"], 120, pause=0.01)
    yield made
    made.close()


@pytest.fixture
def service(replica: ModelReplica) -> Iterator[Service]:
    with run_service(replica, LIMITS, ask=replica.ask) as running:
        yield running


def add(shelf: Path, model: Path) -> None:
    assert commands.join_packages([f"shapes@{shelf}", "--to", str(model)]) == 0


def replace_whole(source: Path, model: Path) -> None:
    """Replace a model as the commands do, without their work."""
    with make_scratch_directory(model) as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        commit_directory(staging, model)


def read_about(service: Service) -> Any:
    return json.loads(service.ask("/v1/tasks")[1])


def test_packages_come_and_go_without_a_lost_request_or_another_old_answer(
    service, replica, shelf, model, tmp_path, monkeypatch
):
    built: list[str] = []
    monkeypatch.setattr(CorpusSearch, "embed_rows", lambda *given: built.append(""))
    expected = [service.ask(*asked)[:2] for asked in OLD]
    assert {status for status, _ in expected} == {200}
    failed: list[tuple[int, str]] = []
    answered = [threading.Semaphore(0) for _ in OLD]
    is_over = threading.Event()

    def send(number: int) -> None:
        while not is_over.is_set():
            found = service.ask(*OLD[number])[:2]
            if found != expected[number]:
                failed.append(found)
            answered[number].release()

    clients = [threading.Thread(target=send, args=(number,)) for number in range(len(OLD))]
    for client in clients:
        client.start()
    former = []
    without = Path(shutil.copytree(model, tmp_path / "without"))
    for number in range(ROUNDS):
        former.append(weakref.ref(replica._model))
        if number == 0:
            add(shelf, model)
            grown = Path(shutil.copytree(model, tmp_path / "grown"))
        else:
            replace_whole(grown, model)
        wait_until(lambda: "shape" in read_about(service)["tasks"], 60, pause=0.01)
        # A task that the list shows is answered.
        status, body, _ = service.ask(*NEW)
        assert (status, json.loads(body)["predictions"][0]["task"]) == (200, "shape")
        former.append(weakref.ref(replica._model))
        if number == 0:
            assert commands.drop_packages(["shapes", "--from", str(model)]) == 0
        else:
            replace_whole(without, model)
        wait_until(lambda: "shape" not in read_about(service)["tasks"], 60, pause=0.01)
        status, message = service.error(*NEW)
        assert (status, "shape" in message, "text_to_image" in message) == (422, True, True)
        for each in answered:
            assert each.acquire(timeout=60)
    is_over.set()
    for client in clients:
        client.join(60)
    assert not failed
    # No corpus was embedded again, and no former model stays in memory.
    assert not built
    gc.collect()
    assert {each() for each in former} <= {None, replica._model}
    assert read_about(service)["problem"] == ""


def test_the_page_and_the_health_follow_the_folder(service, shelf, model):
    body, kind = encode_form(draw_png(), "a.png", "shape")
    before = service.ask("/search")[1]
    status, refused, _ = service.ask("/search", data=body, **{"Content-Type": kind})
    assert (status, "shape" in refused, "shape" in before) == (422, True, False)
    add(shelf, model)
    wait_until(lambda: read_about(service)["packages"] == ["shapes"], 60, pause=0.01)
    health = json.loads(service.ask("/health")[1])
    assert (health["packages"], health["problem"], health["ready"]) == (["shapes"], "", True)
    assert "<option>shape</option>" in service.ask("/search")[1]
    status, page, _ = service.ask("/search", data=body, **{"Content-Type": kind})
    assert (status, page.count("<li>")) == (200, 3)
    assert all(f'<h2 lang="zh">{name}</h2>' in page for name in ("heart", "star", "sun"))
    assert "probability by the model" in page
    assert "as the model reads it" in page
    assert page.count("<option selected>shape</option>") == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: alter(folder / "head-shape.safetensors"), "head-shape.safetensors"),
        (lambda folder: alter(folder / "manifest.json"), "manifest.json"),
        (lambda folder: (folder / "shared.safetensors").unlink(), "shared.safetensors"),
        (lambda folder: shutil.rmtree(folder), "manifest.json"),
        (lambda folder: serve_other_weights(folder), "another answer"),
    ],
)
def test_a_folder_that_cannot_be_served_leaves_the_old_model(
    service, shelf, model, tmp_path, capfd, damage, message
):
    expected = [service.ask(*asked)[:2] for asked in OLD]
    whole = Path(shutil.copytree(model, tmp_path / "whole"))
    staged = Path(shutil.copytree(model, tmp_path / "staged"))
    add(shelf, staged)
    damage(staged)
    swap(staged, model)
    found: list[str] = []

    def is_refused() -> bool:
        found.append(json.loads(service.ask("/health")[1])["problem"])
        return message in found[-1]

    # While the folder has no name, it is another problem.
    wait_until(is_refused, 60, pause=0.01)
    problem = found[-1]
    assert "the model of before answers" in problem
    assert [service.ask(*asked)[:2] for asked in OLD] == expected
    assert service.ask(*NEW)[0] == 422
    # Once, not at every look.
    said = " ".join(capfd.readouterr().err.split())
    assert said.count(" ".join(problem.split())) == 1
    swap(whole, model)
    wait_until(lambda: not json.loads(service.ask("/health")[1])["problem"], 60, pause=0.01)


def swap(source: Path, target: Path) -> None:
    """Replace a folder, which may leave its name for a moment as on NFS."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        source.rename(target)


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def serve_other_weights(folder: Path) -> None:
    """Change weights of the base, and write hashes that fit."""
    name, manifest = "head-text_classification.safetensors", read_manifest(folder)
    tensors = {key: 2 * value for key, value in load_tensors(folder / name).items()}
    save_tensors(tensors, folder / name)
    manifest["files"] |= describe_files(folder, [name])
    write_sealed(folder, manifest)


def test_no_replica_answers_for_an_older_folder_than_another_one(place, shelf, model, monkeypatch):
    monkeypatch.setattr(model_replica, "LOOK_S", 3600.0)
    replicas = [ModelReplica(ServeConfig(str(model), search=False)) for _ in range(2)]
    row = InputRow("row 0", {}, PredictionItem("a.png", data=draw_png(), task="shape"))

    async def ask(replica: ModelReplica, manifest_ns: int) -> Any:
        return await replica.predict(PredictionRequest([row], manifest_ns=manifest_ns))

    async def ask_both() -> None:
        shown = read_change_ns(model / "manifest.json")
        old = await ask(replicas[0], 0)
        assert (old["predictions"], old["manifest_ns"] < shown) == ([], True)
        for replica in replicas:
            answers = await asyncio.gather(*(ask(replica, shown) for _ in range(3)))
            assert {each["predictions"][0]["task"] for each in answers} == {"shape"}
            assert {each["manifest_ns"] for each in answers} == {shown}
            assert (await replica.describe_later(shown))["packages"] == ["shapes"]

    # Until then each has seen the folder as it was.
    for replica in replicas:
        replica.look_at_folder()
    add(shelf, model)
    asyncio.run(ask_both())
    for replica in replicas:
        replica.close()


def test_an_index_stays_valid_when_a_package_joins(place, shelf, model):
    ServedModel(ServeConfig(str(model), str(place.data))).open_indexes()
    add(shelf, model)
    rows: list[int] = []
    after = ServedModel(ServeConfig(str(model), str(place.data)))
    after.open_indexes(rows.append)
    assert (after.describe()["ready"], rows) == (True, [])
