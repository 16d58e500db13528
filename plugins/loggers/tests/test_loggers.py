"""TensorBoard and Weights & Biases get the metrics of a run, and a resumed run continues there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.reporter import LOGGERS, find_observers
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.run import validate_run
from pipelines.training.loop.worker import FinalEvaluation, run_worker
from skillnet.skills import Task
from skillnet_files.entry_points import find_entries
from skillnet_platform.errors import UserError
from tests.unit.skillnet.test_objectives import TEXT, run_of, write_labelled_corpora

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_corpora(tmp_path_factory.mktemp("loggers") / "data")


def train_logged(corpora: Path, folder: Path, logger: str) -> dict[str, float]:
    """Train with a logger; return the values of the last step in the run's own record."""
    run: FinetuneConfig = run_of(corpora, Task("classification", TEXT))
    run.tracking.loggers, run.training.log_every = [logger], 1
    folder.mkdir()
    resolved = ResolvedRun(run, folder)
    validate_run(resolved)
    run_worker(resolved, final=FinalEvaluation(splits=("test",), brief=True))
    lines = [json.loads(each) for each in (folder / "progress.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in lines if "metrics" in line][-1]


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(each.step, each.value) for each in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_metric_of_a_run(corpora: Path, tmp_path: Path) -> None:
    last = train_logged(corpora, tmp_path / "run", "tensorboard")
    scalars = read_scalars(tmp_path / "run")
    for name, value in last.items():
        step, found = scalars[name][-1]
        assert (step, found) == (3, pytest.approx(value, rel=1e-6)), name
    assert any(name.endswith("/test_accuracy") for name in scalars)


def test_steps_that_a_resumed_run_repeats_are_shown_once(tmp_path: Path) -> None:
    (kind,) = find_observers(LOGGERS, ["tensorboard"], "tracking.loggers")
    for steps in ((1, 2, 3, 4), (3, 4, 5)):
        logger = kind()
        logger.start(tmp_path, {})
        for step in steps:
            logger.log_metrics({"topic/loss": 1 / step}, step)
        logger.finish()
    assert [step for step, _ in read_scalars(tmp_path)["topic/loss"]] == [1, 2, 3, 4, 5]


def read_offline(file: Path) -> bytes:
    return file.read_bytes().replace(b"\x82\x01", b"")


@pytest.mark.integration
def test_wandb_has_every_metric_of_a_run(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    last = train_logged(corpora, tmp_path / "run", "wandb")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    text = read_offline(file)
    for name, value in last.items():
        # The name, a length of one byte, and the number as JSON.
        found = re.findall(re.escape(name.encode()) + rb".(-?[0-9.e+-]+)", text, re.DOTALL)
        assert float(found[-1]) == pytest.approx(value, rel=1e-6), name
    assert re.search(rb"/test_accuracy", text)
    assert b"label_smoothing" in text, "the configuration"


@pytest.mark.integration
def test_a_resumed_run_is_the_same_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (kind,) = find_observers(LOGGERS, ["wandb"], "tracking.loggers")
    for step in (1, 2):
        logger = kind()
        logger.start(tmp_path, {"tracking": {"experiment": "skillnet"}})
        logger.log_metrics({"topic/loss": 0.5}, step)
        logger.finish()
    names = {path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert len(names) == 1


@pytest.mark.integration
def test_who_is_not_logged_in_reads_what_to_do(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    words = [
        "from pathlib import Path",
        "from skillnet_loggers.wandb_logger import WandbLogger",
        "WandbLogger().start(Path(), {'tracking': {'experiment': 'skillnet'}})",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "; ".join(words)],
        env=kept | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert "UserError" in last
    assert "wandb login" in last
    assert "WANDB_MODE=offline" in last


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise ModuleNotFoundError("No module named 'wandb'", name="wandb")

    monkeypatch.setattr(type(find_entries(LOGGERS)["wandb"]), "load", fail)
    with pytest.raises(UserError, match=r"tracking.loggers: .*Install the extra wandb: "):
        find_observers(LOGGERS, ["wandb"], "tracking.loggers")
