"""Registrations that meet or are killed: each version has its own weights, and exists once."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import predict
from pipelines.serving import bundle, registration
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from skillnet_platform.tracking import backend, registry
from tests.helpers.processes import run_python, start_python
from tests.helpers.readable_corpora import config, write_corpora
from tests.helpers.tracked_runs import find_champion
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.integration

#: Registers a model, and waits after its bundle is built until the files in argv[4:] exist.
REGISTER = """
import sys, time
from pathlib import Path
from pipelines.training.runs import model_source
from pipelines.serving import bundle, registration

saved, data, ready, *others = sys.argv[1:]
check = bundle.check_bundle

def check_and_wait(folder):
    found = check(folder)
    Path(ready).touch()
    end = time.monotonic() + 250
    while not all(Path(other).exists() for other in others):
        assert time.monotonic() < end, "the other process did not build its bundle"
        time.sleep(0.01)
    return found

bundle.check_bundle = check_and_wait
registration.register_model(model_source.resolve_model(saved), data, rows=[])
"""

#: Registers a small model in forked children, each killed after one more write to the tracker.
KILLS = """
import json, os, sys, uuid
import mlflow
from pathlib import Path
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as TrackingStore
from skillnet_platform import tracking
from skillnet_platform.tracking import registry

folder = Path(sys.argv[1])
WRITES = ("create_", "set_", "log_", "record_", "finalize_", "delete_", "update_")

def kill_after(count):
    left = [count]
    def wrap(owner, name):
        method = getattr(owner, name)
        def counted(*args, **options):
            result = method(*args, **options)
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return result
        setattr(owner, name, counted)
    for owner in (RegistryStore, TrackingStore, LocalArtifactRepository):
        for name in vars(owner):
            if name.startswith(WRITES):
                wrap(owner, name)

def in_child(action):
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def open_run():
    where = tracking.TrackingConfig(system_metrics=False)
    with tracking.start_run("trained", None, where) as tracker:
        (folder / "run").write_text(tracker.run_id)

def register(name):
    registry.register_version(
        (folder / "run").read_text(), folder / "code.py", {"model": folder / "weights"}, {},
        name=name, key=f"key of {name}",
    )

assert in_child(open_run) == 0
for count in range(1, 100):
    name = f"killed-{count}"
    def killed():
        kill_after(count)
        register(name)
    code = in_child(killed)
    assert code in (0, 9), code
    assert in_child(lambda: register(name)) == 0
    if code == 0:
        break
print(json.dumps(count))
"""

CODE = """
import mlflow

class Nothing(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [0 for _ in model_input]

mlflow.models.set_model(Nothing())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run root with prepared corpora and two saved models."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(root))
        write_corpora(root / "corpora")
        for seed, name in enumerate(("one", "two")):
            torch.manual_seed(seed)
            SkillNet(config()).save_pretrained(root / name)
        backend.setup_backend()
        yield root


def start(root: Path, name: str, *others: str) -> subprocess.Popen[str]:
    paths = [root / name, root / "corpora", *(root / f"{each}.ready" for each in (name, *others))]
    return start_python("-c", REGISTER, *paths, stdout=None, stderr=subprocess.PIPE)


def versions(name: str = "skillnet") -> list[Any]:
    client = backend.create_client(backend.resolve_uri())
    found = client.search_model_versions(f"name = '{name}'")
    return [client.get_model_version(name, each.version) for each in found]


def logged_models(name: str) -> list[Any]:
    place = backend.setup_backend()
    client = backend.create_client(place.uri)
    return [m for m in client.search_logged_models([place.experiment_id]) if m.name == name]


@pytest.mark.slow("test_registry.py::test_a_version_waits_for_an_earlier_one_of_another_machine")
def test_two_processes_register_their_own_weights_and_one_is_first(root: Path) -> None:
    processes = [start(root, "one", "two"), start(root, "two", "one")]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    found = versions()
    digests = {model_source.resolve_model(str(root / name)).digest for name in ("one", "two")}
    assert {version.tags["weights_digest"] for version in found} == digests
    for version in found:
        source = model_source.resolve_model(f"models:/skillnet/{version.version}")
        assert source.digest == version.tags["weights_digest"]
        assert source.bundle is not None
        bundle.check_bundle(source.bundle)
    first = [version for version in found if version.tags["gate"] == "the first version"]
    current = find_champion()
    assert [version.version for version in first] == [current.version]
    assert not list((root / "cache").glob(".registering*"))


def test_predict_refuses_a_bundle_that_is_whole_but_not_the_registered_one(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not versions():
        trained = model_source.resolve_model(str(root / "one"))
        registration.register_model(trained, str(root / "corpora"), rows=[])
    current = find_champion()
    folder = registry.resolve_registered("models:/skillnet@champion").path / "artifacts/bundle"
    name = next(
        name
        for name in ("one", "two")
        if model_source.resolve_model(str(root / name)).digest != current.tags["weights_digest"]
    )
    other = bundle.build_bundle(
        model_source.resolve_model(str(root / name)), root / "corpora", root / "other-bundle"
    )
    kept = folder.rename(folder.with_name("kept"))
    shutil.copytree(other, folder)
    kept.rename(root / "kept")
    try:
        assert predict.main(["--text", "古代文学研究"]) == 2
        assert "was altered after its registration" in capsys.readouterr().err
    finally:
        shutil.rmtree(folder)
        (root / "kept").rename(folder)
    assert predict.main(["--text", "古代文学研究"]) == 0


@pytest.mark.slow(
    "test_registration.py::test_a_registration_killed_after_any_write_is_completed_once"
)
def test_sigterm_ends_a_registration_which_the_same_command_completes_once(root: Path) -> None:
    torch.manual_seed(2)
    SkillNet(config()).save_pretrained(root / "ended")
    before = len(versions())
    process = start(root, "ended", "never")
    wait_until((root / "ended.ready").exists, 300, process=process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode != -signal.SIGTERM, "the process had no handler"
    assert "TerminatedError: ended by SIGTERM; the same command resumes it" in err
    assert not list((root / "cache").glob(".registering*"))
    assert len(versions()) == before
    assert start(root, "ended").wait(300) == 0
    # As a kill at the very end of the registration leaves it.
    (root / "cache" / ".registering.sn-0123456789abcdef.tmp" / "bundle").mkdir(parents=True)
    assert start(root, "ended").wait(300) == 0
    assert not list((root / "cache").glob(".registering*"))
    assert len(versions()) == before + 1


@pytest.mark.long
def test_a_registration_killed_after_any_write_is_completed_once(root: Path) -> None:
    (root / "weights").mkdir()
    (root / "weights" / "offset.json").write_text("5")
    (root / "code.py").write_text(CODE)
    done = run_python("-c", KILLS, root)
    assert done.returncode == 0, done.stderr
    writes = json.loads(done.stdout.splitlines()[-1])
    assert writes > 8
    for name in [f"killed-{count}" for count in range(1, writes + 1)]:
        [version] = versions(name)
        assert version.tags["gate"] == "the first version", name
        assert version.tags["skillnet.state"] == "done", name
        assert find_champion(name=name).version == version.version
        [model] = logged_models(name)
        assert (model.status, f"models:/{model.model_id}") == ("READY", version.source), name
        assert registry.resolve_registered(f"models:/{name}@champion").version == 1
