"""Evaluation: every row once, in any order, with metrics that a direct computation confirms."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import evaluate as command
from pipelines import register
from pipelines.data.shards.dataset import open_corpus
from pipelines.training.evaluation.evaluator import evaluate_model
from pipelines.training.evaluation.inference import (
    InferenceRunner,
    batches_by_length,
    memory_inputs,
    split_inputs,
)
from pipelines.training.evaluation.tables import COLUMNS
from skillnet.accounting import account_task
from skillnet.model import SkillNet
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from tests.helpers.prepared_corpora import change_corpus, swap_test
from tests.helpers.readable_corpora import config, write_corpora
from tests.helpers.tracked_runs import run_of, where


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def model() -> SkillNet:
    torch.manual_seed(0)
    return SkillNet(config()).eval()


@pytest.fixture(scope="module")
def rows(model: SkillNet, data: Path) -> list[dict]:
    return evaluate_model(model, data, bootstrap_samples=200, precision="fp32", seed=3, steps=7)


def value(rows: list[dict], task: str, metric: str, split: str = "test") -> float:
    found = [r for r in rows if (r["task"], r["metric"], r["split"]) == (task, metric, split)]
    assert len(found) == 1, f"{task} {metric} {split}: {len(found)} rows"
    return found[0]["value"]


def test_rows_are_tidy_and_complete(rows: list[dict], model: SkillNet):
    assert all(tuple(row) == COLUMNS for row in rows)
    names = {(r["task"], r["split"]) for r in rows}
    assert names == {
        ("text_classification", "test"),
        ("speech_recognition", "test"),
        ("text_to_image", "test"),
        ("text_to_image", "test_unseen_concept"),
        ("text_to_video", "test"),
        ("text_to_code", "test"),
    }
    metrics = [r["metric"] for r in rows if r["task"] == "text_to_code"]
    one_way = ["recall_at_1", "recall_at_5", "recall_at_10", "median_rank"]
    assert metrics == one_way + [f"reverse_{m}" for m in one_way]
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["system"], row["seed"], row["steps"]) == ("skillnet", 3, 7)
        assert row["activated_params"] == account_task(model, row["task"]).activated
        assert row["flops_per_example"] > 0


def test_metrics_equal_a_row_by_row_computation(model: SkillNet, data: Path, rows: list[dict]):
    table = open_corpus(data / "headings").splits["test"].table()
    with torch.no_grad():
        predicted = [
            int(
                model("text_classification", {"input": {"tokens": torch.tensor([tokens])}})[
                    "logits"
                ].argmax()
            )
            for tokens in table.column("tokens").to_pylist()
        ]
    right = table.column("label").to_pylist()
    accuracy = np.mean(np.array(predicted) == np.array(right))
    assert value(rows, "text_classification", "accuracy") == pytest.approx(accuracy)

    table = open_corpus(data / "strokes").splits["test"].table()
    queries, videos = [], []
    with torch.no_grad():
        for row in table.to_pylist():
            tokens = torch.tensor([row["caption_tokens"][0]])
            frames = torch.tensor(row["frames"], dtype=torch.uint8).view(1, 8, 32, 32, 1)
            queries.append(model.embed("text_to_video", "query", {"tokens": tokens}))
            videos.append(model.embed("text_to_video", "candidate", {"frames": frames}))
    similar = torch.cat(queries) @ torch.cat(videos).T
    ranks = (similar >= similar.diag()[:, None]).sum(1).numpy()
    assert value(rows, "text_to_video", "recall_at_5") == pytest.approx(np.mean(ranks <= 5))
    assert value(rows, "text_to_video", "median_rank") == pytest.approx(np.median(ranks))


def test_batching_does_not_change_outputs(model: SkillNet, data: Path):
    table = open_corpus(data / "syllables").splits["test"].table()
    plan = model.config.tasks["speech_recognition"].towers["input"]
    inputs = split_inputs(table, plan, model.config, "syllables/test")
    many, few = InferenceRunner(model, "fp32", 4096), InferenceRunner(model, "fp32", 1)
    assert (
        many.transcribe("speech_recognition", inputs)[0]
        == (few.transcribe("speech_recognition", inputs)[0])
    )
    plan = model.config.tasks["text_to_code"].towers["candidate"]
    table = open_corpus(data / "functions").splits["test"].table()
    inputs = split_inputs(table, plan, model.config, "functions/test", limit=9)
    one = InferenceRunner(model, "fp32", 4096).embed("text_to_code", "candidate", inputs)
    other = InferenceRunner(model, "fp32", 1).embed("text_to_code", "candidate", inputs)
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_memory_and_shard_inputs_agree(model: SkillNet, data: Path):
    runner = InferenceRunner(model, "fp32")
    table = open_corpus(data / "functions").splits["test"].table()
    plan = model.config.tasks["text_to_code"].towers["candidate"]
    stored = split_inputs(table, plan, model.config, "functions/test", limit=9)
    arrays = [np.array(t[:9], np.int32) for t in table.column("tokens").to_pylist()]
    in_memory = memory_inputs(arrays, plan, model.config)
    np.testing.assert_array_equal(
        runner.embed("text_to_code", "candidate", stored),
        runner.embed("text_to_code", "candidate", in_memory),
    )


@pytest.mark.parametrize("positions", [1, 7, 64, 10_000])
def test_batches_hold_every_row_once(positions: int):
    lengths = np.random.default_rng(0).integers(0, 30, 101)
    batches = list(batches_by_length(lengths, positions))
    assert sorted(np.concatenate(batches).tolist()) == list(range(101))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= positions


def test_each_split_is_announced_with_all_rows_that_are_left(data: Path):
    seen: list[tuple[str, str, int, int]] = []
    evaluate_model(
        SkillNet(config()), data, bootstrap_samples=0, on_split=lambda *each: seen.append(each)
    )
    assert len({task for task, *_ in seen}) > 1
    assert [left for *_, left in seen] == [
        sum(rows for _, _, rows, _ in seen[index:]) for index in range(len(seen))
    ]


def test_the_training_mode_is_restored(data: Path):
    model = SkillNet(config()).train()
    evaluate_model(model, data, ["text_classification"], ["validation"], bootstrap_samples=0)
    assert model.training
    assert torch.is_grad_enabled()


def test_named_splits(model: SkillNet, data: Path):
    rows = evaluate_model(model, data, splits=["test_unseen_concept"], bootstrap_samples=0)
    assert {(r["task"], r["split"]) for r in rows} == {("text_to_image", "test_unseen_concept")}
    assert all(np.isnan(r["low"]) for r in rows)
    with pytest.raises(UserError, match=r"no corpus .* has the split 'tset'"):
        evaluate_model(model, data, splits=["test", "tset"], bootstrap_samples=0)


def test_user_errors_have_messages(model: SkillNet, data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="did you mean 'text_to_image'"):
        evaluate_model(model, data, ["text_to_imag"])
    with pytest.raises(UserError, match="skillnet prepare headings"):
        evaluate_model(model, tmp_path, ["text_classification"])
    with pytest.raises(UserError, match="has no column 'pixels'"):
        evaluate_model(model, data, ["text_to_image"], corpora={"text_to_image": "strokes"})
    fewer = config()
    fewer.tasks["text_classification"] = type(fewer.tasks["text_classification"])(
        "classification", fewer.tasks["text_classification"].towers, outputs=9
    )
    with pytest.raises(UserError, match="has 15 labels, the model was built for 9"):
        evaluate_model(SkillNet(fewer), data, ["text_classification"])


def test_command(model: SkillNet, data: Path, run_root: Path, capsys, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--data", str(data), "--bootstrap_samples", "50"]
    out = tmp_path / "figures.csv"
    assert command.main([*words, "--output", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    with out.open(encoding="utf-8") as stream:
        written = list(csv.DictReader(stream))
    assert tuple(written[0]) == COLUMNS
    assert len(written) == len(document["rows"]) + len(document["simple_baselines"])
    assert {row["system"] for row in written} == {"skillnet", "chance", "simple_baseline"}
    assert command.main(words) == 0
    table = capsys.readouterr().out
    assert "text_to_image" in table
    assert "test_unseen_concept, reverse" in table


@pytest.mark.parametrize("main", [command.main, register.main])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("text_to_image=TYPO", "Prepared are: drawings, functions, headings, strokes"),
        ("text_to_imag=drawings", "--corpora: unknown task 'text_to_imag'; did you mean"),
    ],
)
def test_another_corpus_must_exist_and_have_a_task(
    main, option, message, model, data, run_root, capsys, tmp_path
):
    model.save_pretrained(tmp_path / "model")
    task, _, corpus = option.partition("=")
    words = [str(tmp_path / "model"), "--data", str(data), f"--corpora.{task}", corpus]
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_the_command_rejects_a_directory_without_a_model(data, run_root, capsys, tmp_path):
    assert command.main([str(tmp_path / "none"), "--data", str(data)]) == 2
    assert "no folder and no run" in capsys.readouterr().err
    assert command.main([str(tmp_path), "--data", str(data)]) == 2
    assert "holds no complete model" in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_without_auxiliary_tasks(data, tmp_path, run_root):
    from pipelines.evaluate import EvaluateConfig, evaluate_trained_model
    from pipelines.training.runs import model_source
    from skillnet.model_merging import add_task
    from skillnet.skills import SkillPlan, Task

    plan = SkillPlan(("general", "text"), "text")
    helper = Task("retrieval", {"query": plan, "candidate": plan})
    torch.manual_seed(0)
    model = add_task(SkillNet(config()), "text_to_definition", helper)
    run = tmp_path / "run"
    model.save_pretrained(run / "checkpoints" / "step-00000001")
    (run / "config.yaml").write_text(
        "seed: 5\ntasks:\n  text_to_definition: {corpus: headings, auxiliary: true}\n"
        "  text_to_code: {corpus: functions, max_length: 9}\n",
        encoding="utf-8",
    )
    source = model_source.resolve_model(str(run / "checkpoints" / "step-00000001"))
    assert source.auxiliary == {"text_to_definition"}
    assert source.limits["text_to_code"] == 9
    result = evaluate_trained_model(
        EvaluateConfig(
            model=str(source.weights), data=str(data), bootstrap_samples=0, simple_baselines=False
        )
    )
    assert {row["task"] for row in result.rows} == set(config().tasks)
    assert {row["seed"] for row in result.rows} == {5}


def test_every_caption_of_a_row_may_be_a_query(model: SkillNet, tmp_path: Path) -> None:
    """Several captions per row are several queries; intervals and outcomes are per row."""
    from pipelines.training.evaluation.outcomes import OutcomeTable
    from pipelines.training.evaluation.simple_baselines import evaluate_simple_baselines

    data = write_corpora(tmp_path / "corpora")
    found = {}
    for queries in ("first", "all"):
        change_corpus(data / "drawings", queries=queries)
        outcomes = OutcomeTable()
        rows = evaluate_model(
            model, data, ["text_to_image"], ["test"], bootstrap_samples=20, outcomes=outcomes
        )
        figures = {row["metric"]: row["value"] for row in rows}
        found[queries] = figures, outcomes["text_to_image", "test"]
        spec = {"text_to_image": model.config.tasks["text_to_image"]}
        simple = evaluate_simple_baselines(
            data, spec, ["test"], bootstrap_samples=0, use_cache=False
        )
        found[queries] += ({(r["system"], r["metric"]): r["value"] for r in simple},)
    (first, one, simple_first), (every, three, simple_every) = found["first"], found["all"]
    assert len(one) == len(three) == open_corpus(data / "drawings").splits["test"].rows
    assert set(three.denominator) == {3.0}
    assert three.value == pytest.approx(every["recall_at_10"])
    assert one.value == pytest.approx(first["recall_at_10"])
    assert first["median_rank"] != every["median_rank"]
    assert (
        simple_first["simple_baseline", "recall_at_1"]
        != simple_every["simple_baseline", "recall_at_1"]
    )
    chance = ("chance", "recall_at_1")
    assert simple_first[chance] == pytest.approx(simple_every[chance])
    back = ("chance", "reverse_recall_at_10")
    missed = np.prod([(27 - k) / (30 - k) for k in range(10)])  # three right ones among thirty
    assert simple_every[back] == pytest.approx(1 - missed)


@pytest.mark.integration
def test_an_evaluation_on_other_data_leaves_the_metrics_of_the_run(data, tmp_path, run_root):
    from pipelines.evaluate import EvaluateConfig, evaluate_trained_model
    from skillnet_platform.tracking import start_run

    torch.manual_seed(0)
    run, task = run_root / "first", "text_classification"
    SkillNet(config()).save_pretrained(run / "model")
    corpora = shutil.copytree(data, tmp_path / "corpora")
    own = open_corpus(data / "headings").digest
    with start_run("first", tracking=where(), record=run / "run.json") as tracker:
        tracker.metrics({f"{task}/test_accuracy": 0.9, "score": 0.9})

    def evaluate(fold: str, **options: Any) -> list[dict[str, str]]:
        digest = options.pop("trained", own)
        (run / "config.yaml").write_text(
            f"tasks:\n  {task}: {{corpus: headings}}\ncorpora: {{headings: {digest}}}\n{fold}",
            encoding="utf-8",
        )
        options = {"model": "first", "tasks": [task], "bootstrap_samples": 0} | options
        output = tmp_path / "rows.csv"
        evaluate_trained_model(EvaluateConfig(**options, output=str(output)))
        with output.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def metrics() -> list[dict[str, float]]:
        client = backend.create_client(tracker.uri)
        below = f"tags.`mlflow.parentRunId` = '{tracker.run_id}'"
        found = client.search_runs([tracker.experiment_id], below, order_by=["start_time"])
        return [run_of(tracker).data.metrics, *(each.data.metrics for each in found)]

    # Another corpus, a corpus of the same name with other rows, and unknown training data.
    before = metrics()
    changed = change_corpus(corpora / "headings", change=swap_test)
    shutil.copytree(corpora / "headings", corpora / "letters")
    letters = change_corpus(corpora / "letters", corpus="letters")
    for number, (options, corpus, digest) in enumerate(
        (
            ({"data": str(corpora), "corpora": {task: "letters"}}, "letters", letters["digest"]),
            ({"data": str(corpora)}, "headings", changed["digest"]),
            ({"data": str(data), "trained": "0" * 64}, "headings", own),
            ({"data": str(data), "trained": "null"}, "headings", own),
        ),
        1,
    ):
        rows = evaluate("", **options)
        assert {(row["corpus"], row["corpus_digest"]) for row in rows} == {(corpus, digest)}
        assert metrics()[0] == before[0]
        assert len(metrics()) == 1 + number
        (accuracy,) = [r for r in rows if r["metric"] == "accuracy" and r["system"] == "skillnet"]
        logged = metrics()[number]
        assert logged[f"{task}/test_accuracy"] == pytest.approx(float(accuracy["value"]), rel=1e-5)
    # The own data belong to the run, also as a fold, which the rows name.
    for fold, name in (("", ""), ("fold: {count: 3, number: 1}\n", "1 of 3")):
        rows = evaluate(fold, data=str(data))
        assert {row["fold"] for row in rows} == {name}
        assert len(metrics()) == 1 + 4
        assert metrics()[0][f"{task}/test_accuracy"] != 0.9
