"""One run folder, one process: a second one is refused, and one that was killed finishes once."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import finetune
from pipelines.training.runs.layout import lock_run_folder
from skillnet_platform.tracking import backend
from sweeps import sweep
from tests.helpers.processes import run_python
from tests.helpers.readable_corpora import write_corpora
from tests.helpers.small_run import SMALL_RUN, option_arguments

pytestmark = pytest.mark.integration

SMALL = {
    **SMALL_RUN,
    "name": "run",
    "training.steps": 16,
    "training.log_every": 16,
}

#: Runs one command in forked children. Each but the last two is killed at a later point.
KILLS = """
import os, sys
from pathlib import Path
from pipelines import finetune
from pipelines.training.loop import run_evaluation
from skillnet_platform.tracking import run as tracking_run
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

def kill(*args, **options):
    os._exit(9)

def kill_at_result(path, value, write=finetune.write_json):
    if Path(path).name == "result.json":
        os._exit(9)
    write(path, value)

POINTS = [
    (tracking_run, "write_run_id", kill),
    (run_evaluation, "_log_evaluation", kill),
    (SqlAlchemyStore, "set_registered_model_alias", kill),
    (finetune, "write_json", kill_at_result),
    None,
    None,
]
for point in POINTS:
    child = os.fork()
    if child == 0:
        if point is not None:
            setattr(*point)
        os._exit(finetune.main(sys.argv[1:]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if point is None else 9), (point, code)
"""


def words(data: Path) -> list[str]:
    given = {**SMALL, "data": data}
    return ["--config", "quickstart", *option_arguments(given)]


@pytest.mark.parametrize("command", [finetune.main, sweep.main])
def test_a_second_process_gets_a_message_that_names_the_first(
    command: object, run_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "quickstart", "--name", "run"]
    if command is sweep.main:
        arguments = ["--config", "sweeps/width", "--name", "run"]
    # A thread may take its own lock again, so another one holds it.
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_run_folder(run_root / "run"):
            held.set()
            done.wait()

    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(hold)
        assert held.wait(60)
        try:
            assert command(arguments) == 2  # type: ignore[operator]
        finally:
            done.set()
        holder.result()
    said = capsys.readouterr().err
    assert f"{run_root / 'run'}: process {os.getpid()} on " in said.replace("\n", " ")
    assert "works in this folder now" in said.replace("\n", " ")
    assert not (run_root / "run").exists(), "nothing was written"


@pytest.mark.slow(
    "test_registration.py::test_a_registration_killed_after_any_write_is_completed_once"
)
def test_a_run_that_is_killed_while_it_finishes_is_recorded_once(run_root: Path) -> None:
    data = write_corpora(run_root / "corpora")
    done = run_python("-c", KILLS, *words(data))
    assert done.returncode == 0, done.stderr
    place = backend.setup_backend()
    client = backend.create_client(place.uri)
    [run] = client.search_runs([place.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    [version] = client.search_model_versions("name = 'skillnet'")
    assert version.tags["gate"] == "the first version"
    [logged] = client.search_logged_models([place.experiment_id])
    assert version.source == f"models:/{logged.model_id}"
    evaluated = [name for name in run.data.metrics if "/test_" in name or name == "score"]
    assert len(evaluated) > 1
    for name in evaluated:
        assert len(client.get_metric_history(run.info.run_id, name)) == 1, name
    result = json.loads((run_root / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["registered"]["version"] == 1
    assert not [path for path in (run_root / "run").rglob("*.tmp") if ".sn-" in path.name]
