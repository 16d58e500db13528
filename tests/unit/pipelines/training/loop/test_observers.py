"""Metrics, callbacks and loggers of another package, as the page of plug-ins shows them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.reporter import CALLBACKS, LOGGERS, find_observers
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.run import validate_run
from pipelines.training.loop.worker import FinalEvaluation, run_worker
from skillnet.objectives import base
from skillnet.skills import Task
from skillnet_platform.errors import UserError
from tests.helpers.installed_entries import forget_entries
from tests.unit.skillnet.test_objectives import PLUGINS, TEXT, run_of, write_labelled_corpora

ENTRIES = f"""\
[{base.METRICS_GROUP}]
top_three = run_observers:TOP_THREE
[{CALLBACKS}]
heartbeat = run_observers:Heartbeat
[{LOGGERS}]
lines = run_observers:LineLogger
broken = run_observers:Missing
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    site = tmp_path / "site"
    about = site / "observers-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: observers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    (site / "run_observers.py").write_text(PLUGINS["run_observers.py"], "utf-8")
    monkeypatch.syspath_prepend(site)
    forget_entries()
    yield site
    sys.modules.pop("run_observers", None)
    forget_entries()


def observed_run(data: Path) -> FinetuneConfig:
    run = run_of(data, Task("classification", TEXT))
    run.training.callbacks, run.tracking.loggers = ["heartbeat"], ["lines"]
    run.training.log_every = 1
    return run


def test_a_run_calls_the_observers_that_it_names(package: Path, tmp_path: Path) -> None:
    run, folder = observed_run(write_labelled_corpora(tmp_path / "data")), tmp_path / "run"
    folder.mkdir()
    resolved = ResolvedRun(run, folder)
    validate_run(resolved)
    run_worker(resolved, final=FinalEvaluation(splits=("test",), brief=True))
    assert (folder / "heartbeat-0.txt").read_text() == str(run.training.steps - 1)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[0] == {"seed": run.seed}
    assert {record["step"] for record in records[1:]} == {1, 2, 3}
    # The metric of the package is measured beside those of the objective, which it bounds.
    (accuracy,) = [v for k, v in records[-1].items() if k.endswith("/test_accuracy")]
    (top_three,) = [v for k, v in records[-1].items() if k.endswith("/test_top_3_accuracy")]
    assert accuracy <= top_three <= 1


@pytest.mark.usefixtures("package")
def test_a_name_selects_and_imports_nothing() -> None:
    with pytest.raises(UserError, match=r"tracking.loggers: no installed package .*'lines'"):
        find_observers(LOGGERS, ["line"], "tracking.loggers")
    with pytest.raises(UserError, match="no installed package has an entry point"):
        find_observers(CALLBACKS, ["os:system"], "training.callbacks")
    with pytest.raises(UserError, match="cannot be loaded"):
        find_observers(LOGGERS, ["broken"], "tracking.loggers")


def test_a_metric_never_replaces_one_of_the_objective(package, monkeypatch):
    changed = (
        (package / "run_observers.py").read_text("utf-8").replace("top_3_accuracy", "accuracy")
    )
    (package / "run_observers.py").write_text(changed, "utf-8")
    with pytest.raises(ValueError, match="adds accuracy, which classification has"):
        base.find_objective("classification")
