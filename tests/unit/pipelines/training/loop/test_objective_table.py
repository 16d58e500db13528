"""Each cell of the table of objectives and modalities trains, and is evaluated on every row."""

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.preprocessing.paired_corpus import match_groups, write_paired_corpus
from pipelines.data.preprocessing.task_template import describe_task
from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import FinetuneConfig, TaskTraining, TrainingConfig
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines
from pipelines.training.loading.task_dataset import GroupPairs
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_model_tasks
from skillnet.modality import modality_names
from skillnet.objectives.base import find_objective
from skillnet.objectives.retrieval import pair_ranks
from skillnet.skills import SkillPlan, Task
from skillnet_planning.example_batches import build_example_batch
from skillnet_platform.errors import UserError
from tests.helpers.readable_corpora import MODALITY, config, write_labelled_corpora

CORPUS_OF = {modality: corpus for corpus, modality in MODALITY.items()}
PAGE = Path(__file__).parents[5] / "docs" / "tasks.md"


def one_tower(objective: str, modality: str) -> Task:
    return Task(objective, {"input": SkillPlan(("general", modality), modality)})


def two_towers(query: str, candidate: str) -> Task:
    read = {"query": query, "candidate": candidate}
    plans = {k: SkillPlan(("general", m, "alignment"), m) for k, m in read.items()}
    return Task("retrieval", plans)


#: str of the rows -> their second medium in the tests.
SECOND_MEDIUM: dict[str, str] = {
    "image": "sound",
    "sound": "video",
    "video": "code",
    "code": "image",
}


def build_cells() -> dict[tuple[str, str], Task]:
    """Return (row of the table, modality) -> task of every supported cell."""
    cells: dict[tuple[str, str], Task] = {("ctc", "sound"): one_tower("ctc", "sound")}
    for modality in modality_names():
        for objective in ("classification", "multi_label", "regression", "masked"):
            cells[objective, modality] = one_tower(objective, modality)
        cells["retrieval by text", modality] = two_towers("text", modality)
        if modality != "text":
            cells["retrieval of text", modality] = two_towers(modality, "text")
            cells["retrieval of rows", modality] = two_towers(modality, modality)
            cells["retrieval of media", modality] = two_towers(SECOND_MEDIUM[modality], modality)
        cells["two views", modality] = two_towers(modality, modality)
    return cells


CELLS = build_cells()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_labelled_corpora(tmp_path_factory.mktemp("labelled") / "corpora")
    for first, second in SECOND_MEDIUM.items():
        write_paired_corpus(f"{first}_rows", f"{CORPUS_OF[first]}+{CORPUS_OF[second]}", data)
    return data


def run_of(data: Path, task: Task, corpus: str, **settings: object) -> FinetuneConfig:
    training = TrainingConfig(steps=2, threads_per_worker=1, precision="fp32")
    run = FinetuneConfig(
        name="cell",
        data=str(data),
        model=replace(config(), tasks={"cell": task}),
        tasks={"cell": TaskTraining(corpus, batch_size=6, **settings)},
        training=training,
    )
    return resolve_model_tasks(run, {corpus: open_corpus(data / corpus).manifest})


@pytest.mark.parametrize(("row", "modality"), CELLS, ids=lambda value: value.replace(" ", "-"))
def test_a_cell_trains_and_is_evaluated(row: str, modality: str, data: Path) -> None:
    task = CELLS[row, modality]
    corpus = f"{modality}_rows" if row == "retrieval of media" else CORPUS_OF[modality]
    is_paired = row == "two views"
    run = run_of(data, task, corpus, views=is_paired, auxiliary=is_paired)
    shapes = build_example_batch(run, "cell", 6, 6).targets
    batch = ResolvedRun(run).dataloader.batch(0)
    assert {name: x.shape[0] for name, x in shapes.items() if name != "values"} == {
        name: x.shape[0] for name, x in batch.targets.items() if name != "values"
    }
    result = train_model(ResolvedRun(run))
    assert np.isfinite(result.losses["cell"])
    if is_paired:
        return  # it only supports other tasks, and is not measured
    outcomes = OutcomeTable()
    split = "validation" if row == "masked" else "test"
    rows = evaluate_model(
        result.model, data, corpora={"cell": corpus}, splits=[split], outcomes=outcomes
    )
    metric = find_objective(task.objective).primary.name
    (found,) = [each for each in rows if each["metric"] == metric]
    assert np.isfinite(found["value"])
    if row in ("multi_label", "regression"):
        assert found["high"] <= 1
        assert all(each["low"] >= 0 for each in rows if each["metric"] != "r_squared")
    if row != "masked":
        part = outcomes["cell", split]
        assert len(part) == open_corpus(data / corpus).splits[split].rows
        assert part.value == pytest.approx(found["value"])


@pytest.mark.parametrize("objective", ["multi_label", "regression"])
def test_the_simple_baseline_beats_chance(objective: str, data: Path) -> None:
    specs = run_of(data, one_tower(objective, "text"), "headings").model.tasks
    rows = evaluate_simple_baselines(data, specs, corpora={"cell": "headings"}, use_cache=False)
    metric = find_objective(objective).primary.name
    assert {row["system"] for row in rows} == {"chance", "simple_baseline"}
    assert all(np.isfinite(row["value"]) for row in rows if row["metric"] == metric)


def test_a_regression_predicts_in_the_unit_of_its_corpus(data: Path) -> None:
    run = run_of(data, one_tower("regression", "text"), "headings")
    model = train_model(ResolvedRun(run)).model
    rows = evaluate_model(model, data, corpora={"cell": "headings"}, splits=["test"])
    (error,) = [each for each in rows if each["metric"] == "mean_absolute_error"]
    # The values are 100, 110, 120 …: standardized predictions would miss them by their mean.
    mean, _ = model.vocabulary.scales["cell"]
    assert error["value"] < mean


def test_a_query_of_rows_is_another_row_of_the_group() -> None:
    pairs = GroupPairs(np.array([7, -1, 3, 7, 3, 7]), "here")
    assert pairs.draw(np.arange(6)).tolist() == [3, 1, 4, 5, 2, 0]
    drawn = {int(pairs.draw(np.array([0]), np.array([choice]))[0]) for choice in (0.0, 0.4, 0.9)}
    assert drawn == {3, 5}
    # A loading process maps the table of the rows.
    many = [GroupPairs(np.arange(rows) // 2, "here") for rows in (10, 10_000)]
    small, large = map(pickle.dumps, many)
    assert len(small) == len(large)
    rows = np.arange(10_000)
    assert np.array_equal(pickle.loads(large).draw(rows), many[1].draw(rows))  # noqa: S301
    with pytest.raises(UserError, match="here: no two rows have one group"):
        GroupPairs(np.array([-1, -1, 4]), "here")


def test_rows_that_search_each_other_are_no_answer_to_themselves() -> None:
    vectors = np.eye(3)[[0, 1, 0, 2]]
    ranks = pair_ranks(vectors, vectors, np.array([5, 6, 5, 6]))
    assert ranks.tolist() == [1, 3, 1, 3]  # ties count against the model
    assert np.isnan(pair_ranks(vectors, vectors, np.array([5, 5, 1, 2]))[2:]).all()


def test_towers_of_two_media_need_rows_with_both(data: Path) -> None:
    run = run_of(data, two_towers("sound", "image"), "drawings")
    with pytest.raises(UserError, match="towers read sound and image, but the rows of drawings"):
        ResolvedRun(run).dataloader.batch(0)


def test_rows_pair_by_group_in_turn() -> None:
    partner = match_groups(np.array([7, 3, 7, -1, 7, 9]), np.array([7, -1, 7, 3]))
    assert partner.tolist() == [0, 3, 2, -1, 0, -1]
    assert match_groups(np.array([1, 2]), np.array([], np.int64)).tolist() == [-1, -1]


def test_corpora_that_do_not_pair_are_named(data: Path) -> None:
    for pair, message in (
        ("drawings+headings", "drawings holds image, headings text. Give corpora of two media"),
        ("image_rows+strokes", "image_rows is a corpus of pairs itself"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            write_paired_corpus("both", pair, data)
    assert not (data / "both").exists()
    rows = open_corpus(data / "image_rows").splits["train"].table()
    sounds = open_corpus(data / "syllables").splits["train"].table()
    number = sounds["key"].to_pylist().index(rows["paired_key"][2].as_py())
    assert rows["paired_log_mel"][2] == sounds["log_mel"][number]
    assert rows["group"][2] == sounds["group"][number]


def test_init_task_writes_a_task_for_a_paired_corpus(data: Path) -> None:
    template = describe_task(str(data / "sound_rows"), None, "both.yaml")
    assert (template.name, template.objective) == ("video_to_sound", "retrieval")


def test_the_page_shows_exactly_these_cells() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| objective | modalities |")[2]
    found = set()
    for line in table.partition("\n\n")[0].splitlines()[2:]:
        objectives, modalities, *_ = [cell.strip() for cell in line.strip("|").split("|")]
        named = {name for name in modality_names() if name in modalities}
        if modalities.startswith("all"):
            named = set(modality_names()) - named
        found |= {(row, name) for row in re.findall(r"`([a-z_ ]+)`", objectives) for name in named}
    assert found == set(CELLS)
