"""The run of a merge: its name, its record in MLflow, and its registration."""

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.merge import merge_trained_models
from pipelines.serving.registration import register_model
from pipelines.training.config.growth import MergeConfig
from pipelines.training.runs import model_source
from skillnet.model import SkillNet
from skillnet.model_merging import add_task
from skillnet.skills import Task
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from skillnet_platform.tracking.champion import OtherTasksError
from tests.helpers.prepared_corpora import change_corpus, swap_test
from tests.helpers.readable_corpora import config, write_corpora
from tests.helpers.tracked_runs import where

pytestmark = pytest.mark.integration

HEADINGS = "text_classification"


@pytest.fixture
def place(run_root: Path) -> Path:
    """A run root with corpora, and models that grew from one base by one head each."""
    write_corpora(run_root / "corpora")
    torch.manual_seed(0)
    tasks = {HEADINGS: config().tasks[HEADINGS]}
    base = SkillNet(dataclasses.replace(config(), tasks=tasks))
    base.save_pretrained(run_root / "base")
    for name in ("one", "two", "three"):
        grown = copy.deepcopy(base)
        task = "second" if name == "three" else name
        add_task(grown, task, Task("classification", dict(tasks[HEADINGS].towers), 15))
        with torch.no_grad():
            for parameter in grown.heads[task].parameters():
                parameter.normal_()
        grown.save_pretrained(run_root / name)
    return run_root


def merge(place: Path, *models: str, **options: Any) -> dict[str, Any]:
    corpora = dict.fromkeys(("one", "two", "second", "other"), "headings")
    given = {"name": "both", "corpora": corpora, "tracking": where()} | options
    return merge_trained_models(MergeConfig([str(place / name) for name in models], **given))


def test_a_used_name_is_refused_for_another_merge(place: Path) -> None:
    first = merge(place, "one", "two")
    # The same merge, also of the same model at another address, is finished.
    shutil.copytree(place / "two", place / "copy")
    for again in (("one", "two"), ("one", "copy")):
        assert merge(place, *again)["seconds"] == first["seconds"]
    kept = {path: path.read_bytes() for path in (place / "both").rglob("[!.]*") if path.is_file()}
    moved = shutil.copytree(place / "corpora", place / "moved")
    change_corpus(moved / "headings", change=swap_test)
    for models, options, words in (
        (("one", "two"), {"rename": ["2:two=other"]}, "rename"),
        (("one", "two"), {"average_shared": True}, "average_shared"),
        (("one", "two"), {"without": ["sound"]}, "without"),
        (("one", "two"), {"data": str(moved)}, "corpora.headings"),
        (("one", "three"), {}, "models"),
        (("two", "one"), {}, "models"),
        (("one", "two", "three"), {}, "models"),
    ):
        with pytest.raises(UserError, match=rf"merge both has {words} .*--name"):
            merge(place, *models, **options)
    assert kept == {path: path.read_bytes() for path in kept}
    # A merge that was killed before its result continues if it is the same one.
    (place / "both" / "result.json").unlink()
    with pytest.raises(UserError, match="average_shared"):
        merge(place, "one", "two", average_shared=True)
    assert merge(place, "one", "two")["parents"] == first["parents"]


def test_a_merge_is_registered_if_its_parts_are_or_a_name_is_given(place: Path) -> None:
    def versions() -> list[tuple[str, str]]:
        found = backend.create_client(backend.resolve_uri()).search_model_versions()
        return sorted((each.name, each.run_id) for each in found)

    first = merge(place, "one", "two")
    assert first["registered"] is None
    one, two = (
        model_source.resolve_model(str(place / name)).with_corpora({name: "headings"})
        for name in ("one", "two")
    )
    register_model(one, place / "corpora", name="parts", bootstrap_samples=20)
    assert merge(place, "one", "two", name="half")["registered"] is None
    assert {name for name, _ in versions()} == {"parts"}
    named = dataclasses.replace(where(), registered_model="asked")
    assert merge(place, "one", "two", name="asked", tracking=named)["registered"]["name"] == "asked"
    register_model(two, place / "corpora", name="parts", bootstrap_samples=20)
    made = merge(place, "one", "two", name="whole")["registered"]
    assert (made["name"], made["version"]) == ("tests", 1)
    never = dataclasses.replace(where(), register=False)
    assert merge(place, "one", "two", name="never", tracking=never)["registered"] is None


def test_the_list_of_runs_shows_score_and_tasks_of_a_merge(place: Path) -> None:
    made = merge(place, "one", "two")
    client = backend.create_client(backend.resolve_uri())
    run = client.get_run(str(model_source.resolve_model("both").run_id))
    figures = {
        row["task"]: row["value"]
        for row in made["evaluation"]
        if (row["metric"], row["split"]) == ("accuracy", "test")
    }
    assert figures.keys() == {HEADINGS, "one", "two"}
    for task, value in figures.items():
        assert run.data.metrics[f"{task}/test_accuracy"] == pytest.approx(value)
    assert run.data.metrics["score"] == pytest.approx(sum(figures.values()) / 3)
    assert set(run.data.tags["tasks"].split(", ")) == figures.keys()
    assert run.data.tags["system"] == "skillnet"


def test_unrelated_models_do_not_share_a_default_name(place: Path) -> None:
    data = place / "corpora"
    model_of = model_source.resolve_model

    def register(model: str, **options: Any) -> tuple[str, int]:
        task = "second" if model == "three" else model
        source = model_of(str(place / model)).with_corpora({task: "headings"})
        made = register_model(source, data, bootstrap_samples=20, **options)
        return made.name, made.version

    assert register("one") == ("skillnet", 1)
    for other in ("two", "three"):
        with pytest.raises(OtherTasksError, match=r"champion also has one, .*--name skillnet-"):
            register(other)
    assert register("two", name="skillnet") == ("skillnet", 2)
    assert register("three", name="apart") == ("apart", 1)
    # A model with all tasks of the champion and more is its next version.
    named = dataclasses.replace(where("skillnet"), register=False)
    merge(place, "one", "two", tracking=named)
    made = register_model(model_of("both"), data, bootstrap_samples=20)
    assert (made.name, made.version) == ("skillnet", 3)
