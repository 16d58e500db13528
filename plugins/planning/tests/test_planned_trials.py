"""Memory of the trials of sweeps and studies before they start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.training.config.run import PretrainConfig
from plugins.planning.tests.test_memory_plan import MASKED, masked_model, short_config
from skillnet_cluster.checks.cluster import check_gpu_memory
from skillnet_planning.memory_check import (
    MAX_PLANNED_RUNS,
    find_memory_problem,
    select_largest_runs,
)
from skillnet_planning.plan import main as plan
from skillnet_platform.cluster.gpu_types import GPU_TYPES, GpuType, NodeType
from skillnet_studies.config.study import StudyConfig, SystemConfig
from skillnet_studies.study.study import list_study_runs, request_study
from sweeps.config.space import SearchDimension
from sweeps.config.sweep import SweepConfig
from sweeps.config.trials import ResourceConfig
from sweeps.search.space import list_sweep_runs, request_sweep
from tests.helpers.small_models import small_config

L4 = NodeType("gpu", {"GPU": 1}, 1, "g6.2xlarge")


def sweep_of(**space: SearchDimension) -> SweepConfig:
    names = {name.replace("__", "."): each for name, each in space.items()}
    return SweepConfig(
        run=short_config(use_gpu=True), space=names, resources=ResourceConfig(gpus=0.25)
    )


def test_a_trial_of_a_sweep_that_does_not_fit_its_share_is_named() -> None:
    dims = SearchDimension(choice=[32, 8192])
    config = sweep_of(model__dim=dims, training__lr=SearchDimension(choice=[1e-3, 1e-2]))
    assert len(list_sweep_runs(config)) == 4
    # The learning rate does not change the memory.
    assert len(select_largest_runs(list_sweep_runs(config))) == 2
    (finding,) = check_gpu_memory([], [L4], request_sweep(config))
    assert finding.level == "error"
    assert finding.seen.startswith("model.dim 8192, training.lr 0.001: ")
    assert "--run.model.dim" in finding.advice
    # Four trials share the card.
    assert "GB on each L4 (6 GB)" in finding.seen


def test_the_largest_of_many_trials_are_planned() -> None:
    widths = SearchDimension(choice=[32 * width for width in range(1, 2 * MAX_PLANNED_RUNS)])
    chosen = select_largest_runs(list_sweep_runs(sweep_of(model__dim=widths)))
    assert [run.config.model.dim for run in chosen][:2] == [352, 320]
    assert len(chosen) == MAX_PLANNED_RUNS


def study_of() -> StudyConfig:
    small = small_config(num_layers=1)
    systems = {
        "skillnet": SystemConfig("skillnet"),
        "skillnet-pretrained": SystemConfig("skillnet", pretrain=True),
        "wide": SystemConfig("dense", set={"model.dim": 16384}),
    }
    return StudyConfig(
        run=replace(short_config(use_gpu=True), model=small),
        pretraining=PretrainConfig(model=masked_model(), tasks=MASKED),
        systems=systems,
        resources=ResourceConfig(gpus=1),
    )


@pytest.mark.slow("test_planned_trials.py::test_plan_shows_the_runs_of_a_study")
def test_each_system_of_a_study_is_planned() -> None:
    study = study_of()
    runs = select_largest_runs(list_study_runs(study))
    # Equal runs are planned once.
    labels = {run.label: run.prefix for run in runs}
    assert labels == {
        "skillnet": "run.",
        "pretraining of skillnet-pretrained": "pretraining.",
        "wide": "run.",
    }
    planned = request_study(study).list_runs
    assert planned is not None
    found = find_memory_problem(planned(), GPU_TYPES["L4"])
    assert found[0].startswith("wide: ")
    assert find_memory_problem(planned(), GpuType("large", 10_000, 1000, 100, 10)) is None


def test_plan_shows_the_runs_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(
        "run:\n"
        "  model: {dim: 64, num_layers: 1, num_heads: 2}\n"
        "  tasks: {text_classification: {corpus: headings}}\n"
        "systems: {a: {system: skillnet}, b: {system: dense, set: {model.dim: 16384}}}\n",
        encoding="utf-8",
    )
    words = ["compare", "--config", str(tmp_path / "study.yaml"), "--gpus", "4xL4"]
    assert plan([*words, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["runs"]["a"]["fits"]
    # The runs of the study have one worker each.
    assert document["runs"]["a"]["workers"] == 1
    assert not document["runs"]["b"]["fits"]
    assert plan(words) == 1
    shown = capsys.readouterr()
    assert "largest task" in shown.out
    assert "b: it does not fit" in shown.err
