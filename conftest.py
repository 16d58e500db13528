"""What every test may need: a run root of its own, and one Ray for the whole session."""

import fcntl
import gc
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The libraries that collection imports stay. Searching them for garbage took half of its time.
gc.disable()
# Before torch is imported: small tests on few cores lose time with more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each further process of a tracker loads MLflow for seconds.
os.environ.setdefault("MLFLOW_WORKERS", "1")
for name in ("COLUMNS", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "SKILLNET_DEBUG"):
    os.environ.pop(name, None)

#: First word of the groups of tests that share a Ray.
RAY = "ray"
CPUS = 4
GPUS = 2

_SLOW_MACHINES = (HealthCheck.too_slow, HealthCheck.data_too_large)
# The same examples each time: what decides over a change is the change, not the day's luck. New
# ground is the long lane's, and what it finds joins the short one as an @example.
settings.register_profile(
    "short",
    deadline=None,
    suppress_health_check=_SLOW_MACHINES,
    derandomize=True,
    max_examples=40,
)
settings.register_profile(
    "long", deadline=None, suppress_health_check=_SLOW_MACHINES, max_examples=200
)
settings.load_profile("short")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests stay in one process where pytest-xdist runs several (``make test``).

    Those that share a session's Ray, files with stores of all kinds, which share their servers,
    and those of one file, which share what their fixtures make.
    Two processes have a Ray each, for the two halves of the alphabet: one would be the last to end.
    """
    all_stores = {i.path for i in items if "store_uri" in getattr(i, "fixturenames", ())}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        group = item.path.name
        if "ray_session" in fixtures:
            group = f"{RAY}, files before p" if group < "test_p" else f"{RAY}, other files"
        elif item.path in all_stores:
            group = "stores"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(trylast=True)  # after the fixtures of the test, which may need Ray
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End Ray after the last test of its group: waiting, it would take a twelfth of a core."""

    def find_group(each: pytest.Item) -> str:
        marker = each.get_closest_marker("xdist_group")
        return str(marker.args[0]) if marker else ""

    group = find_group(item)
    if "PYTEST_XDIST_WORKER" not in os.environ or nextitem is None or not group.startswith(RAY):
        return
    if find_group(nextitem) != group:
        for fixture in item.session._fixturemanager.getfixturedefs("ray_session", item) or ():
            fixture.finish(item._request)  # type: ignore[attr-defined]


def pytest_collection_finish() -> None:
    """Collect garbage again, but never look at the imported libraries."""
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Free the libraries at the end: one of them reports objects that nobody frees.

    What is added first is done last: pytest searches for garbage five times before.
    """
    config.add_cleanup(gc.unfreeze)


@pytest.fixture(scope="session", autouse=True)
def session_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run root for the session, so that no test writes into the checkout."""
    root = tmp_path_factory.mktemp("runs")
    before = os.environ.get("SKILLNET_HOME")
    os.environ["SKILLNET_HOME"] = str(root)
    yield root
    if before is None:
        os.environ.pop("SKILLNET_HOME", None)
    else:
        os.environ["SKILLNET_HOME"] = before


@pytest.fixture(scope="session", autouse=True)
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Return MLflow's tables without a run; a database that a test's client creates is a copy.

    One process creates them in two seconds, and all copy them in none. SQLite does not wait for
    the disk: no test cuts the power.
    """
    from skillnet_platform.tracking import backend
    from skillnet_platform.tracking.backend import sqlite_uri

    # The folder that the processes of pytest-xdist have in common.
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if is_worker else tmp_path_factory.getbasetemp()
    empty, made = folder / "empty.db", tmp_path_factory.mktemp("tracking") / "mlflow.db"
    require = backend.require_database

    def find_empty() -> Path:
        with (folder / "empty.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not empty.exists():
                backend.create_client(sqlite_uri(made)).search_experiments()
                shutil.copyfile(made, empty)
        return empty

    def skip_waits(connection: Any, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    def require_and_copy(path: Path) -> None:
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        require(path)
        if not event.contains(Engine, "connect", skip_waits):
            event.listen(Engine, "connect", skip_waits)
        if path != made and not path.exists() and path.parent.is_dir():
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            shutil.copyfile(find_empty(), part)
            part.replace(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "require_database", require_and_copy)
        yield find_empty


@pytest.fixture
def run_root(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    empty_database: Callable[[], Path],
) -> Path:
    """A run root for one test. Ray's workers keep the session's: pass them paths."""
    root = tmp_path / "runs"
    root.mkdir()
    monkeypatch.setenv("SKILLNET_HOME", str(root))
    if request.node.get_closest_marker("integration"):
        shutil.copyfile(empty_database(), root / "mlflow.db")
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five small corpora, made once. Tests only read them."""
    from tests.helpers.small_corpora import write_corpora

    return write_corpora(tmp_path_factory.mktemp("corpora") / "data")


@pytest.fixture(scope="session")
def ray_session(session_root: Path) -> Iterator[Any]:
    """The session's only Ray, with more slots than cores so that two workers always fit.

    It offers GPUs that do not exist, so that workers with GPUs are placed.
    """
    import ray

    from skillnet_platform.cluster import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_gpus=GPUS))
        with ray_session(cpus=CPUS) as session:
            patch.undo()
            yield session


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare in this process, also beside a Ray and with media."""
    from tests.helpers.prepared_corpora import prepare_in_process

    prepare_in_process(monkeypatch)


@pytest.fixture(scope="session")
def object_store_server() -> Iterator[Any]:
    """The session's only S3-compatible server; ask for ``object_store``."""
    from tests.helpers.object_store import ObjectStore

    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture
def object_store(object_store_server: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An S3-compatible server, found through the environment; ``uri`` is the test's folder."""
    from tests.helpers.object_store import BUCKET, in_environment

    place = "".join(c if c.isalnum() else "-" for c in request.node.nodeid)
    object_store_server.uri = f"s3://{BUCKET}/{place}"
    with in_environment({**object_store_server.environment, "SKILLNET_STORE_PATIENCE": "60"}):
        yield object_store_server


@pytest.fixture(scope="session")
def google_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The session's only emulator of Google's store."""
    from tests.helpers.cloud_stores import google

    server = google(tmp_path_factory.mktemp("google"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The session's only emulator of Azure's store."""
    from tests.helpers.cloud_stores import azure

    server = azure(tmp_path_factory.mktemp("azure"))
    yield server
    server.close()


@pytest.fixture
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder in a store of the kind that the test's parameter names."""
    if request.param == "s3":
        yield request.getfixturevalue("object_store").uri
    elif request.param in ("google", "azure"):
        from tests.helpers.cloud_stores import reached

        server = request.getfixturevalue(f"{request.param}_server")
        with reached(server):
            yield f"{server.uri}/{tmp_path.name}"
    else:
        places = {
            "disk": f"{tmp_path}/store",
            "file": f"file://{tmp_path}/store",
            "memory": f"memory://{tmp_path.name}",
        }
        yield places[request.param]
