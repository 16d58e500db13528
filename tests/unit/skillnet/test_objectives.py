"""Objectives: one of a third party trains and is evaluated, and outputs come from the manifest."""

import json
import math
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, r2_score

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import FinetuneConfig, TaskTraining, TrainingConfig
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.inference import InferenceRunner, split_inputs
from pipelines.training.evaluation.outcomes import OutcomeTable
from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_model_tasks
from skillnet.config import SkillNetConfig
from skillnet.metrics import MetricIntervals
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.objectives import base, heads
from skillnet.objectives.base import NamedMetric, Objective
from skillnet.objectives.heads import head_class
from skillnet.objectives.multi_label import average_precision_of_rows
from skillnet.objectives.regression import RegressionHead
from skillnet.skills import SkillPlan, Task, pretrained_modalities
from skillnet.vocabulary import ModelVocabulary, parse_vocabulary
from skillnet_planning.example_batches import build_example_batch
from skillnet_platform.cli import main
from skillnet_serving.server.config import ServeConfig, ServerLimits
from skillnet_serving.server.served_model import ServedModel
from tests.helpers.installed_entries import forget_entries
from tests.helpers.local_server import run_service
from tests.helpers.readable_corpora import config, write_labelled_corpora

Rows = list[tuple[Any, ...]]
TEXT = {"input": SkillPlan(("general", "text"), "text")}

ROOT = Path(__file__).parents[3]
#: Complete files of the page of plug-ins: name -> source.
PLUGINS = {path.name: path.read_text("utf-8") for path in ROOT.glob("tests/*_package/*.py")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_corpora(tmp_path_factory.mktemp("corpora") / "data")


def install(place: Path, entries: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install an entry point per line of ``entries``, as pip leaves a package."""
    about = place / "made-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: made\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{base.GROUP}]\n{entries}\n")
    monkeypatch.syspath_prepend(place)
    forget_entries()


@pytest.fixture
def margin_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = ROOT / "tests" / "objective_package"
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"][base.GROUP].items()
    monkeypatch.syspath_prepend(package)
    install(tmp_path / "site", f"{name} = {value}\nother = {value}", monkeypatch)
    yield
    sys.modules.pop("margin_objective", None)
    forget_entries()


def run_of(data: Path, task: Task, corpus: str = "headings") -> FinetuneConfig:
    """Return a run of one task, with the outputs of the manifest."""
    run = FinetuneConfig(
        name="made",
        data=str(data),
        model=replace(config(), tasks={"subject": task}),
        tasks={"subject": TaskTraining(corpus, batch_size=8)},
        training=TrainingConfig(
            steps=3, threads_per_worker=1, precision="fp32", micro_batch_size=4
        ),
    )
    return resolve_model_tasks(run, {corpus: open_corpus(data / corpus).manifest})


def measure(run: FinetuneConfig, model: TaskModel, outcomes: OutcomeTable | None = None) -> Rows:
    """Return the rows of a model and of the simple baselines, without their date."""
    places = {"corpora": {"subject": run.tasks["subject"].corpus}}
    rows = evaluate_model(model, run.data, outcomes=outcomes, **places)
    tasks = run.model.tasks
    rows += evaluate_simple_baselines(run.data, tasks, use_cache=False, **places)
    return [(row["system"], row["split"], row["metric"], row["value"], row["low"]) for row in rows]


@pytest.mark.usefixtures("margin_package")
def test_an_objective_of_another_package_walks_from_rows_to_answers(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path / "home"))
    run = run_of(data, Task("margin", TEXT))
    assert run.model.tasks["subject"].outputs == 15
    assert build_example_batch(run, "subject", 2, 2).targets["labels"].shape == (2,)
    model, outcomes = train_model(ResolvedRun(run)).model, OutcomeTable()
    rows = measure(run, model, outcomes)
    assert {(system, metric) for system, _, metric, *_ in rows} == {
        (system, metric)
        for system in ("skillnet", "chance", "simple_baseline")
        for metric in ("margin_hits", "mean_margin")
    }
    value = {system: value for system, _, metric, value, _ in rows if metric == "margin_hits"}
    assert outcomes["subject", "test"].value == value["skillnet"]
    assert value["simple_baseline"] > value["chance"]
    # From saved weights to a folder for others, and from there to answers.
    model.save_pretrained(tmp_path / "weights")
    folder = tmp_path / "exported"
    given = ["--data", str(data), "--corpora.subject", "headings", "--output", str(folder)]
    assert main(["export", "--model", str(tmp_path / "weights"), *given]) == 0
    output = tmp_path / "answers.jsonl"
    given = ["--model", str(folder), "--text", "文学研究", "--output", str(output)]
    assert main(["predict", *given]) == 0
    answer = json.loads(output.read_text(encoding="utf-8"))
    assert answer["answer"] in model.vocabulary.outputs["subject"]
    assert answer["score"] >= 0
    limits = ServerLimits(max_bytes=200_000, max_rows=3, max_requests=4, timeout_s=30.0)
    with run_service(ServedModel(ServeConfig(str(folder))), limits) as service:
        status, body, _ = service.ask("/v1/predict", {"rows": [{"text": "文学研究"}]})
    assert status == 200
    (served,) = json.loads(body)["predictions"]
    assert (served["answer"], served["score"]) == (answer["answer"], pytest.approx(answer["score"]))
    (best,) = SkillNet.from_pretrained(folder).classify(["文学研究"])
    assert best.answer == answer["answer"]


def two_towers(query: str, candidate: str) -> dict[str, SkillPlan]:
    read = {"query": query, "candidate": candidate}
    return {tower: SkillPlan(("general", each), each) for tower, each in read.items()}


@pytest.mark.parametrize(
    ("objective", "corpus", "towers"),
    [
        ("classification", "headings", TEXT),
        ("multi_label", "headings", TEXT),
        ("regression", "headings", TEXT),
        ("ctc", "syllables", {"input": SkillPlan(("general", "sound"), "sound")}),
        ("retrieval", "drawings", two_towers("text", "image")),
        ("retrieval", "drawings", two_towers("image", "image")),
        ("masked", "syllables", {"input": SkillPlan(("general", "sound"), "sound")}),
        ("masked", "drawings", {"input": SkillPlan(("general", "image"), "image")}),
    ],
)
def test_a_built_in_objective_works_as_well_under_another_name(
    objective: str,
    corpus: str,
    towers: dict[str, SkillPlan],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing depends on its name, so a package can bring each of its kinds."""
    (tmp_path / "copies.py").write_text(
        "from dataclasses import replace\n"
        "from skillnet.objectives.base import find_objective\n"
        f"ours = find_objective({objective!r})\n"
        "towers = ours.towers if ours.pairs_towers else ('row',)\n"
        "COPY = replace(ours, name='copy', towers=towers)\n"
    )
    install(tmp_path, "copy = copies:COPY", monkeypatch)
    found = []
    for name in (objective, "copy"):
        plans = towers
        if name == "copy" and len(towers) == 1:
            plans = {"row": next(iter(towers.values()))}
        run = run_of(data, Task(name, plans), corpus)
        result = train_model(ResolvedRun(run))
        spec, predictor = run.model.tasks["subject"], InferenceRunner(result.model)
        table = open_corpus(data / corpus).splits["test"].table()
        tower = spec.row_tower
        inputs = {tower: split_inputs(table, spec.towers[tower], run.model, "here")}
        answers = None
        if base.find_objective(name).has_labels:
            head, names = head_class(spec), [str(n) for n in range(spec.outputs)]
            answers = head.answer(head.infer(predictor, "subject", inputs), names, 2)
        pretrained = pretrained_modalities("subject", spec)
        batch = build_example_batch(run, "subject", 2, 2)
        shapes = {key: value.shape for key, value in batch.targets.items()}
        rows = measure(run, result.model)
        # NaN differs from itself, so the texts are compared.
        found.append(repr((result.losses, rows, answers, pretrained, shapes)))
    sys.modules.pop("copies", None)
    forget_entries()
    assert found[0] == found[1]


def test_the_page_of_plug_ins_shows_the_packages_that_tests_install() -> None:
    page = (ROOT / "docs" / "reference" / "plugins.md").read_text(encoding="utf-8")
    shown = re.findall(r'^--8<-- "(.+)"$', page, re.MULTILINE)
    assert {Path(each).name for each in shown} == set(PLUGINS)


@pytest.mark.usefixtures("margin_package")
@pytest.mark.parametrize("wrong", [0, 1, 7, 8])
def test_the_interval_of_another_packages_accuracy_stays_in_range(wrong: int) -> None:
    task = Task("margin", TEXT, outputs=2)
    labels = np.array([0] * wrong + [1] * (8 - wrong))
    predictions = np.tile([0.0, 1.0], (8, 1))
    found = head_class(task).evaluate(task, predictions, {"labels": labels}, MetricIntervals())
    value, low, high = found.metrics["margin_hits"]
    assert 0 <= low <= value <= high <= 1
    assert value == 1 - wrong / 8
    assert low < high


@pytest.mark.parametrize(
    ("metric", "bounds", "scale"),
    [
        ("accuracy", (0.0, 1.0), "share"),
        ("word_error_rate", (0.0, math.inf), "error_rate"),
        ("perplexity", (1.0, math.inf), "free"),
        ("correlation", (-1.0, 1.0), "free"),
    ],
)
def test_bounds_decide_the_scale_of_a_metric(
    metric: str, bounds: tuple[float, float], scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = NamedMetric(metric, bounds=bounds)
    made = Objective("made", "skillnet.objectives.heads:TaskHead", (named,))
    assert named.scale == scale
    monkeypatch.setattr(heads, "find_objective", lambda _: made)
    # Three rows of very different scores have an interval far beyond the bounds.
    monkeypatch.setattr(
        "skillnet.objectives.heads.TaskHead.score_rows",
        classmethod(lambda *_: (np.array([0.9, 1.0, 0.2]), np.ones(3))),
    )
    spec = Task("regression", TEXT)
    found = heads.TaskHead.evaluate(spec, None, {}, MetricIntervals())
    value, low, high = found.metrics[metric]
    assert bounds[0] <= low or low == value
    assert value <= high <= bounds[1]


@pytest.mark.usefixtures("margin_package")
def test_an_entry_point_names_the_objective_of_its_own_name() -> None:
    with pytest.raises(ValueError, match=r"skillnet\.objectives:other names no Objective"):
        Task("other", TEXT)


def test_a_task_without_outputs_takes_those_of_its_corpus(data: Path) -> None:
    config = run_of(data, Task("classification", TEXT))
    assert config.model.tasks["subject"].outputs == 15
    # A number that the user gives stays, and validation compares it with the corpus.
    assert run_of(data, Task("classification", TEXT, 7)).model.tasks["subject"].outputs == 7


def test_a_task_whose_outputs_nobody_knows_is_named() -> None:
    config = SkillNetConfig(tasks={"mood": Task("classification", TEXT)})
    with pytest.raises(ValueError, match=r"model\.tasks\.mood\.outputs is 0: .* of its labels"):
        SkillNet(config)


def test_average_precision_equals_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = random.random((40, 6)) < 0.3
    truth[~truth.any(1), 0] = True
    scores = random.integers(0, 4, truth.shape) / 4  # with equal scores
    ours = average_precision_of_rows(scores, truth)
    assert ours.mean() == pytest.approx(label_ranking_average_precision_score(truth, scores))
    assert average_precision_of_rows(scores[:1], np.zeros((1, 6), bool)).tolist() == [0]


def test_the_score_of_a_regression_is_r_squared() -> None:
    random = np.random.default_rng(1)
    right, predicted = random.normal(5, 2, 50), random.normal(5, 2, 50)
    numerator, denominator = RegressionHead.score_rows(predicted[:, None], {"numbers": right})
    assert numerator.sum() / denominator.sum() == pytest.approx(r2_score(right, predicted))


def test_the_scale_of_a_regression_is_saved_with_the_model() -> None:
    vocabulary = ModelVocabulary("digest", {"topic": ("a",)}, {"price": (3.5, 0.25)})
    assert parse_vocabulary(vocabulary.to_dict()) == vocabulary
    assert vocabulary.restrict_to(["price"]).scales == {"price": (3.5, 0.25)}
    # Files of models without a regression keep their bytes.
    assert "scales" not in ModelVocabulary("digest").to_dict()
    for wrong in ([1.0], [1.0, 0.0], [float("nan"), 1.0], ["1", 2.0]):
        with pytest.raises(ValueError, match=r"vocabulary\.scales\.price"):
            parse_vocabulary(vocabulary.to_dict() | {"scales": {"price": wrong}})
