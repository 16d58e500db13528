"""Sweeps through Ray Tune: ASHA, failures, a killed driver, nested workers, leftovers."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.finetune import finetune
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.loop.setup import build_model
from skillnet_platform import config as configuration
from skillnet_platform import tracking
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import TrackingConfig, backend
from sweeps.config.trials import AshaConfig, ResourceConfig, ScoreConfig
from sweeps.sweep import main
from sweeps.trials import engine
from sweeps.trials.engine import run_trials
from sweeps.trials.trial import Trial, TrialOutcome
from tests.chaos.sweep_runs import DRIVER
from tests.helpers.processes import kill_family
from tests.helpers.small_corpora import small_config
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.integration

TASKS = ("text_classification", "text_to_image")


def base(data: Path, **training: object) -> FinetuneConfig:
    """Return a run of two tasks that takes about a second."""
    config = small_config(data, **({"steps": 6, "log_every": 2, "precision": "fp32"} | training))
    tasks = {name: config.tasks[name] for name in TASKS}
    model = replace(config.model, tasks={name: config.model.tasks[name] for name in TASKS})
    return replace(config, model=model, tasks=tasks)


def save_overflowing(config: FinetuneConfig, folder: Path) -> str:
    """Save a model of a run whose weights are finite and whose outputs are not."""
    model = build_model(resolve_run(config).config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e38)
    model.save_pretrained(folder)
    return str(folder)


def trial(name: str, config: FinetuneConfig, **more: Any) -> Trial:
    return Trial(name, config, splits=("validation",), **more)


def runs_below(run_id: str) -> dict[str, Any]:
    """Return name -> child run of an MLflow run."""
    client = backend.create_client(backend.resolve_uri())
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return {run.info.run_name: run for run in found}


@pytest.fixture
def parent(run_root: Path) -> Iterator[tracking.Tracker]:
    with tracking.start_run("parent", tracking=TrackingConfig(system_metrics=False)) as tracker:
        yield tracker


@pytest.mark.long
def test_asha_a_failure_and_a_resumed_sweep(
    data: Path,
    parent: tracking.Tracker,
    run_root: Path,
    ray_session: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = base(data, evaluate_every=2, checkpoint_every=2)
    trials = [
        trial("good", good),
        trial("broken", replace(good, data=str(data.parent / "gone"))),
        trial("lame", replace(good, training=replace(good.training, lr=1e-9, max_grad_norm=1e-9))),
    ]
    with pytest.raises(UserError, match=r"trial broken: .*skillnet prepare"):
        run_trials(trials, folder=run_root / "early", parent=parent)
    assert runs_below(parent.run_id) == {}, "nothing has started"

    # What only shows while it trains does not end the others.
    trials[1] = trial("broken", replace(good, init_from=save_overflowing(good, run_root / "huge")))
    settings: dict[str, Any] = {
        "folder": run_root / "sweep",
        "parent": parent,
        "score": ScoreConfig(),
        "asha": AshaConfig(reduction_factor=2),
        # One after the other: halving asks who came first.
        "resources": ResourceConfig(max_concurrent_trials=1),
        "keep": 1,
    }
    outcomes = {outcome.name: outcome for outcome in run_trials(trials, **settings)}
    assert list(outcomes) == [each.name for each in trials]
    assert outcomes["good"].status == "finished"
    assert outcomes["good"].step == 6
    assert [line["step"] for line in outcomes["good"].reports] == [2, 4, 6]
    assert outcomes["lame"].status in ("stopped", "finished")
    broken = outcomes["broken"]
    assert broken.status == "failed"
    assert broken.error is not None
    assert "not finite" in broken.error, broken.error
    assert broken.log is not None
    assert "Traceback" in broken.log.read_text(encoding="utf-8")
    assert f"trial broken: {broken.error}" in capsys.readouterr().err

    statuses = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    children = runs_below(parent.run_id)
    for name, outcome in outcomes.items():
        assert children[name].info.status == statuses[outcome.status]
        assert children[name].info.run_id == outcome.run_id
    assert children["broken"].data.tags["failure"] == broken.error
    assert children["good"].data.metrics["score"] == pytest.approx(outcomes["good"].score)
    assert children["good"].data.params["training.lr"] == "0.003"
    assert engine.find_placement_groups(ray_session) == []

    best = max((o for o in outcomes.values() if o.status == "finished"), key=lambda o: o.score or 0)
    for outcome in outcomes.values():
        kept = outcome is best
        assert (outcome.folder / "model").is_dir() == kept, outcome.name
        if outcome.status != "failed":
            assert (outcome.folder / "checkpoints").is_dir() == kept, outcome.name
        assert (outcome.folder / "evaluation.csv").is_file() == (outcome.status == "finished")

    # Again: only the failed one is tried again, now that what made it fail is gone.
    before = {name: (o.folder / "outcome.json").stat().st_mtime for name, o in outcomes.items()}
    again = {outcome.name: outcome for outcome in run_trials(trials, **settings)}
    for name, outcome in again.items():
        assert outcome.status == outcomes[name].status
        assert outcome.score == outcomes[name].score
        written = (outcome.folder / "outcome.json").stat().st_mtime
        assert (written > before[name]) == (name == "broken"), name
    with pytest.raises(UserError, match=r"trial good: the run good has training\.lr 0\.003, not"):
        run_trials(
            [trial("good", replace(good, training=replace(good.training, lr=0.5)))], **settings
        )


@pytest.mark.slow("test_trial_engine.py::test_asha_replays_reports_from_before_a_kill")
def test_a_bad_trial_is_stopped_and_stays_stopped(
    data: Path, parent: tracking.Tracker, run_root: Path, ray_session: Any
) -> None:
    config = base(data, evaluate_every=2, checkpoint_every=1)
    settings: dict[str, Any] = {
        "folder": run_root / "halved",
        "parent": parent,
        "score": ScoreConfig(),
        "asha": AshaConfig(reduction_factor=2),
        "keep": 1,
    }
    (first,) = run_trials([trial("first", config)], **settings)
    # A score better than any possible one, so the next trial is behind in any case.
    path = first.folder / "reports.jsonl"
    lines = [json.loads(line) | {"score": 2.0} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    both = [trial("first", config), trial("behind", replace(config, seed=1))]
    behind = run_trials(both, **settings)[1]
    assert behind.status == "stopped"
    assert behind.step == 2
    assert [line["step"] for line in behind.reports] == [2]
    run = runs_below(parent.run_id)["behind"]
    assert run.info.status == "KILLED"
    assert run.data.tags["stopped_early"] == "by successive halving at step 2"
    assert not (behind.folder / "result.json").exists()
    for name, kept in (("first", True), ("behind", False)):
        assert (run_root / "halved" / name / "checkpoints").is_dir() == kept, name
    written = (behind.folder / "outcome.json").stat().st_mtime_ns
    again = run_trials(both, **settings)[1]
    assert (again.status, again.step) == ("stopped", 2)
    assert (behind.folder / "outcome.json").stat().st_mtime_ns == written, "not run again"


@pytest.mark.slow("test_finetune.py::test_two_ray_workers_reach_the_same_weights")
def test_nested_workers_train_like_one_process(
    data: Path, parent: tracking.Tracker, run_root: Path, ray_session: Any
) -> None:
    config = base(data, evaluate_every=3, workers=2, precision="fp64")
    (two,) = run_trials(
        [trial("two", config)],
        folder=run_root / "nested",
        parent=parent,
        score=ScoreConfig(),
        resources=ResourceConfig(cpus=0.5),
    )
    assert two.status == "finished", two.error
    assert two.result is not None
    assert two.result["world"] == 2
    alone = finetune(replace(config, name="alone", training=replace(config.training, workers=1)))
    assert two.result["losses"] == pytest.approx(alone["losses"])
    assert [line["step"] for line in two.reports] == [3, 6]
    assert runs_below(parent.run_id)["two"].info.status == "FINISHED"
    assert engine.find_placement_groups(ray_session) == []
    with pytest.raises(UserError, match=r"a trial takes 18 CPUs .*lower resources\.cpus"):
        run_trials(
            [trial("wide", config)],
            folder=run_root / "wide",
            parent=parent,
            resources=ResourceConfig(cpus=9),
        )


def sweep_file(path: Path, run: FinetuneConfig, **more: Any) -> Path:
    body = {
        "run": configuration.to_dict(run),
        "tracking": {"system_metrics": False},
        **more,
    }
    path.write_text(json.dumps(body), encoding="utf-8")  # JSON is YAML
    return path


@pytest.mark.slow("test_sweeps.py::test_asha_a_failure_and_a_resumed_sweep")
def test_optuna_with_seeds_from_the_command_line(
    data: Path,
    run_root: Path,
    ray_session: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = sweep_file(
        tmp_path / "sweep.yaml",
        base(data, steps=3),
        name="guided",
        space={
            "training.lr": {"loguniform": [1e-4, 1e-2]},
            "model.skill_modules": {"choice": ["both", "feedforward"]},
        },
        search="optuna",
        samples=2,
        seeds=[0, 1],
        fixed_cost={"adjust": "ffn_dim", "tolerance": 0.05},
        resources={"max_concurrent_trials": 2},
    )
    assert main(["--config", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"] == {"finished": 4, "stopped": 0, "failed": 0}
    first, second = result["configurations"]
    assert first["score"] >= second["score"]
    assert len(first["trials"]) == 2
    costs = [each["activated_params"] for each in result["configurations"]]
    assert costs[0] == pytest.approx(costs[1], rel=0.1)
    with Path(result["files"]["trials"]).open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["seed"] for row in rows] == ["0", "1", "0", "1"]
    assert all(row["status"] == "finished" and row["training.lr"] for row in rows)

    best = configuration.parse_config(
        FinetuneConfig, ["--config", result["best"]["config"]], "skillnet"
    )
    assert best.training.lr == pytest.approx(result["best"]["settings"]["training.lr"])
    assert best.evaluate
    run = backend.create_client(backend.resolve_uri()).get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["score"] == pytest.approx(first["score"])
    assert {child.info.status for child in runs_below(result["run_id"]).values()} == {"FINISHED"}
    # The test splits were not looked at.
    for outcome in result["trials"]:
        text = (Path(outcome["folder"]) / "evaluation.csv").read_text(encoding="utf-8")
        assert ",validation," in text
        assert ",test," not in text

    assert main(["--config", str(path), "--samples", "3"]) == 2
    assert "the sweep guided has samples 2, not 3" in capsys.readouterr().err


def test_an_invalid_sweep_is_rejected_before_anything_starts(
    data: Path, run_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = base(data)
    wrong = sweep_file(tmp_path / "wrong.yaml", run, space={"model.dimm": {"choice": [16]}})
    assert main(["--config", str(wrong), "--name", "x"]) == 2
    assert "did you mean 'model.dim'" in capsys.readouterr().err
    space = {"training.lr": {"choice": [0.1, 0.2]}}
    asha = sweep_file(tmp_path / "asha.yaml", run, space=space, scheduler="asha")
    assert main(["--config", str(asha), "--name", "x"]) == 2
    assert "set training.evaluate_every between 1 and training.steps" in capsys.readouterr().err
    # The database of the fixture is all there is.
    assert [path.name for path in run_root.iterdir()] == ["mlflow.db"]


@pytest.mark.slow("test_sweeps.py::test_asha_a_failure_and_a_resumed_sweep")
def test_a_killed_driver_and_an_interrupted_one(
    data: Path, run_root: Path, ray_session: Any, tmp_path: Path
) -> None:
    path = sweep_file(
        tmp_path / "sweep.yaml",
        base(data, steps=100, checkpoint_every=10, log_every=10),
        name="killed",
        space={"training.lr": {"choice": [1e-3, 2e-3, 3e-3]}},
        resources={"max_concurrent_trials": 1},
    )
    trials = run_root / "killed" / "trials"

    def wait_for_checkpoint(name: str) -> None:
        folder = trials / name / "checkpoints"
        wait_until(lambda: any(folder.glob("step-*/manifest.json")), 240)

    first = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "--config", str(path)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until((trials / "000-seed0" / "outcome.json").is_file, 240)
        wait_for_checkpoint("001-seed0")
    finally:
        kill_family(first)
    assert not (trials / "001-seed0" / "result.json").is_file()
    finished = (trials / "000-seed0" / "result.json").stat().st_mtime
    client = backend.create_client(backend.resolve_uri())
    identity = json.loads((run_root / "killed" / "run.json").read_text(encoding="utf-8"))["run_id"]
    assert client.get_run(identity).info.status == "RUNNING"

    def interrupt() -> None:
        wait_for_checkpoint("002-seed0")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["--config", str(path)]) == 130
    result = json.loads((trials / "001-seed0" / "result.json").read_text(encoding="utf-8"))
    assert result["resumed"] > 0, "it resumed from its checkpoint"
    assert (trials / "000-seed0" / "result.json").stat().st_mtime == finished, "not run again"
    states = {name: run.info.status for name, run in runs_below(identity).items()}
    assert states == {"000-seed0": "FINISHED", "001-seed0": "FINISHED", "002-seed0": "KILLED"}
    stopped = json.loads((trials / "002-seed0" / "trained.json").read_text(encoding="utf-8"))
    assert stopped["preempted"], "the trial that ran wrote a checkpoint before it ended"
    assert client.get_run(identity).info.status == "KILLED"
    assert engine.find_placement_groups(ray_session) == []

    assert main(["--config", str(path)]) == 0
    result = json.loads((run_root / "killed" / "result.json").read_text(encoding="utf-8"))
    assert result["counts"] == {"finished": 3, "stopped": 0, "failed": 0}
    last = json.loads((trials / "002-seed0" / "result.json").read_text(encoding="utf-8"))
    assert last["resumed"] == stopped["step"] > 10
    assert [run.info.status for run in runs_below(identity).values()] == ["FINISHED"] * 3
    assert client.get_run(identity).info.status == "FINISHED"


def test_outcomes_have_their_last_score() -> None:
    reports = [{"step": 2, "score": 0.1}, {"step": 4, "score": 0.3}]
    outcome = TrialOutcome("a", "a", Path(), "stopped", reports=reports)
    assert (outcome.score, outcome.step, outcome.seconds) == (0.3, 4, None)
