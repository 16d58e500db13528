"""The runs of a growth: trained files, evaluated old tasks, and reference runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.training.config.growth import NewTask
from pipelines.training.config.run import TaskTraining
from pipelines.training.growth import runs, verification
from pipelines.training.growth.report import FileState, GrowthReport, TaskState, TransferResult
from pipelines.training.loop.init_from import find_origin
from pipelines.training.runs.model_source import ModelSource
from skillnet.model import SkillNet
from skillnet.skills import SkillPlan
from skillnet_platform.config import to_yaml
from skillnet_platform.errors import UserError
from tests.helpers.sixth_corpus import grow_config, write_labelled_clips
from tests.helpers.small_corpora import small_config, write_corpora


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpora(tmp_path_factory.mktemp("corpora") / "data", rows=8, test_rows=4)
    write_labelled_clips(folder)
    return folder


def saved(tmp_path: Path, data: Path, *tasks: str) -> ModelSource:
    """A saved model of some of the five tasks, without a run."""
    shape = small_config(data).model
    torch.manual_seed(0)
    model = SkillNet(replace(shape, tasks={name: shape.tasks[name] for name in tasks}))
    model.save_pretrained(tmp_path / "model")
    return ModelSource("saved", tmp_path / "model")


def test_a_new_modality_adds_a_stem_that_also_trains_without_the_skill(tmp_path, data):
    source = saved(tmp_path, data, "text_classification")
    config = replace(grow_config("saved", data), run_dir=str(tmp_path))
    before = runs.load_growable_model(source)
    settings = runs.build_growth_config(config, source, before)
    grown = runs.build_grown_model(config, before, settings.model.tasks["counting"])
    new = verification.added_files(before, grown)
    assert new == ["head-counting", "skill-ink", "stem-tubelet"]
    assert "ink" not in before.config.skills
    settings.training.trainable = new
    settings.run_dir = str(tmp_path)
    other = runs.build_reference_config("without_skill", config, settings, source, tmp_path)
    # Its folder means nothing to the user, who reads where a run started.
    assert find_origin(other.init_from) == "saved"
    assert other.training.trainable == ["head-counting", "stem-tubelet"]
    assert other.model.tasks["counting"].skills == ("general", "video")
    fresh = runs.build_reference_config("fresh", config, settings, source, tmp_path)
    assert (fresh.init_from, fresh.training.trainable, list(fresh.trained)) == (
        None,
        [],
        ["counting"],
    )


def test_old_tasks_are_evaluated_with_their_training_settings(tmp_path: Path, data: Path) -> None:
    source = saved(tmp_path, data, "text_to_code", "text_classification")
    tasks = {"text_to_code": {"corpus": "functions", "max_length": 7, "auxiliary": False}}
    source = replace(source, settings={"tasks": tasks})
    config = grow_config("saved", data)
    settings = runs.build_growth_config(config, source, runs.load_growable_model(source))
    assert settings.tasks["text_to_code"] == TaskTraining("functions", max_length=7, eval_only=True)
    assert settings.tasks["text_classification"].corpus == "headings"
    assert list(settings.trained) == ["counting"]
    assert settings.model.tasks["counting"].outputs == 3
    config.corpora = {"text_to_code": "mine"}
    assert (
        runs.build_growth_config(config, source, runs.load_growable_model(source))
        .tasks["text_to_code"]
        .corpus
        == "mine"
    )


def test_a_task_with_only_the_new_skill_has_no_reference_without_it(tmp_path, data):
    source = saved(tmp_path, data, "text_classification")
    config = grow_config("saved", data)
    task = NewTask("counting", {"input": SkillPlan(("ink",), "video")}, TaskTraining("counts"))
    config = replace(config, task=task)
    settings = replace(
        runs.build_growth_config(config, source, runs.load_growable_model(source)),
        run_dir=str(tmp_path),
    )
    assert runs.build_reference_config("without_skill", config, settings, source, tmp_path) is None


def test_equal_start_models_share_one_directory(tmp_path: Path, data: Path) -> None:
    source = saved(tmp_path, data, "text_classification")
    config = grow_config("saved", data)
    before = runs.load_growable_model(source)
    task = runs.resolve_new_task(config)
    kept = [
        runs.save_start_model(runs.build_grown_model(config, before, task), str(tmp_path))
        for _ in range(2)
    ]
    assert kept[0] == kept[1]
    assert len(list((tmp_path / ".starts").iterdir())) == 1
    other = replace(config, seed=5)
    assert (
        runs.save_start_model(runs.build_grown_model(other, before, task), str(tmp_path)) != kept[0]
    )


def test_float64_weights_are_rejected(tmp_path: Path, data: Path) -> None:
    source = saved(tmp_path, data, "text_classification")
    SkillNet.from_pretrained(source.weights).double().save_pretrained(source.weights)
    with pytest.raises(UserError, match="float64"):
        runs.load_growable_model(source)


def growth(**changes: object) -> GrowthReport:
    values: dict[str, object] = {
        "source": "base", "source_digest": "", "skill": "ink", "task": "counting",
        "corpus": "counts", "objective": "classification", "steps": 1, "seed": 0,
        "total_params": 10, "rows_compared": 4, "rows_changed": 0,
        "files": [FileState("shared", "a", "a"), FileState("skill-ink", None, "b")],
        "tasks": [TaskState("text_to_code", "test", "recall_at_10", 0.5, 0.5, True)],
        "optimizer_files": ["skill-ink"],
        "transfer_results": [
            TransferResult("grown", "test", "accuracy", 0.5, 0.4, 0.6, [], 3, 1.0)
        ],
    }  # fmt: skip
    return GrowthReport(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": [FileState("shared", "a", "b")]}, "shared is changed: sha256 a before, b after"),
        ({"files": [FileState("shared", "a", None)]}, "shared is gone"),
        (
            {"tasks": [TaskState("text_to_code", "test", "recall_at_10", 0.5, 0.4, False)]},
            "text_to_code test recall_at_10 was 0.5 and is 0.4",
        ),
        ({"rows_changed": 1}, "the outcomes of 1 rows of old tasks changed"),
        ({"optimizer_files": ["shared", "skill-ink"]}, "kept state for shared, skill-ink"),
    ],
)
def test_a_change_is_named(changes: dict[str, object], message: str) -> None:
    assert growth().is_unchanged
    verification.assert_frozen_unchanged(growth())
    report = growth(**changes)
    assert not report.is_unchanged
    assert "NOT unchanged" in report.summarize()
    with pytest.raises(RuntimeError, match=message):
        verification.assert_frozen_unchanged(report)


def test_a_report_keeps_its_values_in_json_and_has_readable_tables() -> None:
    import json

    report = growth()
    again = GrowthReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    text = report.to_markdown()
    assert "| text_to_code | test | R@10 | 50.0 % | 50.0 % | same |" in text
    assert "| skill-ink | new | – | b |" in text
    assert "accuracy 50.0 % (40.0–60.0)" in report.summarize()


def test_a_used_name_is_refused_for_other_references(tmp_path: Path, data: Path) -> None:
    config, stored = grow_config("saved", data), tmp_path / "grow.yaml"
    stored.write_text(to_yaml(replace(config, references=["fresh", "everything"])), "utf-8")
    runs.check_same_references(replace(config, references=["everything", "fresh"]), stored)
    for others in ([], ["fresh"]):
        with pytest.raises(UserError, match=r"has references \['fresh', 'everything'\], not"):
            runs.check_same_references(replace(config, references=others), stored)


def test_a_metric_that_an_old_task_chose_is_shown_in_place_of_the_primary_one() -> None:
    states = [
        TaskState("topics", "test", "accuracy", 0.9, 0.9, True),
        TaskState("topics", "test", "macro_f1", 0.8, 0.8, True),
        TaskState("text_to_code", "test", "recall_at_10", 0.5, 0.5, True),
        TaskState("text_to_code", "test", "recall_at_1", 0.25, 0.25, True),
    ]
    text = growth(tasks=states, chosen={"topics": "macro_f1"}).to_markdown()
    assert "| topics | test | macro-F1 | 80.0 % | 80.0 % | same |" in text
    assert "| text_to_code | test | R@10 | 50.0 % | 50.0 % | same |" in text
    assert "accuracy | 90.0 %" not in text
    assert "R@1 |" not in text
