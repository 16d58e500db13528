"""A study end to end: tuned, run, reported and resumed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.config.folds import FoldConfig
from pipelines.training.config.run import PretrainConfig, TaskTraining
from pipelines.training.evaluation.outcomes import read_outcomes
from skillnet_platform import config as configuration
from skillnet_platform.tracking import backend
from skillnet_studies import compare as command
from skillnet_studies.config.study import StudyConfig, SystemConfig, TuningConfig
from skillnet_studies.study.kept_results import TUNING, KeptStudy
from sweeps.config.space import SearchDimension
from sweeps.config.trials import ResourceConfig
from tests.helpers.small_corpora import small_config, write_corpora

pytestmark = pytest.mark.integration

TASK = "text_classification"


def study(root: Path) -> StudyConfig:
    run = small_config(write_corpora(root / "corpora"), steps=4, precision="fp32", log_every=2)
    run = replace(
        run,
        tasks={TASK: run.tasks[TASK]},
        model=replace(run.model, tasks={TASK: run.model.tasks[TASK]}),
        fold=FoldConfig(2, validation_share=0.3, reserve_part=True),
    )
    pretraining = PretrainConfig(
        tasks={"masked_text": TaskTraining("headings", batch_size=4, split="train", max_length=16)},
        training=run.training,
    )
    return StudyConfig(
        name="study",
        seeds=[0],
        keep=str(root / "kept"),
        run=run,
        pretraining=pretraining,
        systems={
            "skillnet": SystemConfig("skillnet"),
            "skillnet-pretrained": SystemConfig(
                "skillnet", pretrain=True, reuse_tuning_of="skillnet"
            ),
        },
        tuning=TuningConfig(1, {"training.lr": SearchDimension(choice=[0.01])}, seeds=[9]),
        interpret=False,
        # Trials side by side would each start a process.
        resources=ResourceConfig(max_concurrent_trials=1),
    )


@pytest.mark.long
def test_a_study_runs_and_resumes(ray_session: Any, run_root: Path, tmp_path: Path, capsys):
    config = study(tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(configuration.to_yaml(config), encoding="utf-8")
    assert command.main(["--config", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    labels = list(config.systems)
    assert sorted((run["system"], run["seed"]) for run in report["runs"]) == [
        (label, seed) for label in labels for seed in (0, 10000)
    ]
    folder = run_root / "study"
    ledger = json.loads((folder / "study.json").read_text())
    assert [len(ledger["tuning"][label]["trials"]) for label in labels] == [1, 0]
    kept = KeptStudy(tmp_path / "kept/study").content[TUNING]
    assert [entry["score"] for entry in kept] == [ledger["tuning"]["skillnet"]["score"]]
    chosen = ledger["tuning"]["skillnet"]["settings"]
    for label in labels:
        run = folder / "runs" / f"{label}-fold1-seed10000"
        settings = configuration.load_yaml(run / "config.yaml")
        assert settings["training"]["lr"] == chosen.get("training.lr", config.run.training.lr)
        assert {split for _, split in read_outcomes(run / "outcomes.parquet")} == {"test"}
    # Tuning never saw the test rows.
    for trial in (folder / "tuning").glob("skillnet-t*"):
        assert {split for _, split in read_outcomes(trial / "outcomes.parquet")} == {"validation"}
        assert not (trial / "model").exists()
    starts = {
        configuration.load_yaml(
            folder / "runs" / f"skillnet-pretrained-fold{fold}-seed{10000 * fold}" / "config.yaml"
        )["init_from"]
        for fold in (0, 1)
    }
    assert len(starts) == 2
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Tuning" in page
    assert "Gain from pretraining" in page

    # One parent, its children, none of them left running.
    client = backend.create_client(backend.resolve_uri(None))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    parent = next(run for run in runs if run.info.run_name == "study")
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1 == 1 + 2 + 4
    files = {entry.path for entry in client.list_artifacts(parent.info.run_id, "comparison")}
    assert {"comparison/report.html", "comparison/results.csv"} <= files

    # Again: nothing is trained a second time, and the figures are the same.
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/*/result.json")}
    assert command.main(["--config", str(path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*/*/result.json")} == before
    assert again["summary"] == report["summary"]
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)

    # Another machine resumes from the kept results alone: nothing is tuned or trained again.
    shutil.rmtree(folder)
    assert command.main(["--config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == report["summary"]
    assert not (folder / "tuning").exists()
    assert not list(folder.glob("runs/*/model"))

    # The reserve is read once. All final models were evaluated on it before they were lost.
    assert command.main(["--config", str(path), "--read_reserve", "once", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 4
    assert (folder / "reserve/report.html").is_file()
    assert command.main(["--config", str(path), "--read_reserve", "once"]) != 0
    assert "the reserve was read on" in " ".join(capsys.readouterr().err.split())

    assert command.main([str(tmp_path / "kept/study"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == report["summary"]
