"""Corpora that a rule labels: from the command line to a trained model that verify traces."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from pipelines import finetune, prepare, verify
from pipelines.data.config.label_rule import LabelRule
from pipelines.data.preprocessing import labelled_corpus
from pipelines.data.preprocessing.labelled_corpus import write_labelled_corpus
from pipelines.data.shards.dataset import CorpusSplit, PreparedCorpus, open_corpus
from pipelines.data.transforms.text import find_labels
from pipelines.training.config.run import FinetuneConfig
from skillnet.skills import DEFAULT_SKILLS
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.readable_corpora import write_corpora
from tests.helpers.small_run import SMALL_RUN, option_arguments

CONFIGS = Path(__file__).parents[5] / "configs"
#: The shape of a drawing, as its caption names it; one shape is no class.
SHAPE = "方块|圆圈|横条"
SHAPES = LabelRule("captions", SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("labelled") / "corpora")


def names_of(corpus: PreparedCorpus, split: str) -> list[str]:
    """Return the names of the classes of the rows."""
    labels = corpus.splits[split].column("label").to_pylist()
    return [corpus.manifest["labels"][label] for label in labels]


def first_captions(split: CorpusSplit) -> list[str]:
    return [row[0] for row in split.column("captions").to_pylist()]


def test_rows_keep_their_columns_and_splits(data: Path) -> None:
    write_labelled_corpus("shapes", "drawings", SHAPES, data)
    source, made = open_corpus(data / "drawings"), open_corpus(data / "shapes", verify=True)
    assert made.splits.keys() == source.splits.keys() - {"pretrain"}
    for name, split in made.splits.items():
        before, after = (each.splits[name].table().combine_chunks() for each in (source, made))
        matches = [re.search(SHAPE, row[0]) for row in before["captions"].to_pylist()]
        before = before.filter(pa.array([match is not None for match in matches]))
        for column in ("key", "group", "unit", "pixels"):
            assert after[column].equals(before[column])
            assert split.schema.field(column).equals(before.field(column), check_metadata=True)
        assert names_of(made, name) == [match[0] for match in matches if match]
        assert "captions" not in after.column_names, "the answer is in no column"
    assert made.task == "image_classification"
    assert made.source_names == ("drawings",)


def test_equal_rules_give_equal_bytes(data: Path) -> None:
    first = write_labelled_corpus("again", "drawings", SHAPES, data)
    second = write_labelled_corpus("again", str(data / "drawings"), SHAPES, data)
    assert first == second
    other = write_labelled_corpus("again", "drawings", LabelRule("captions", "^."), data)
    assert other["digest"] != first["digest"]


@pytest.mark.parametrize(
    ("pattern", "count", "found"),
    [
        ("b.", None, ["bc", "b1", None]),
        ("b(.)", None, ["c", "1", None]),
        ("(?P<letter>b[a-z])|(?P<digit>b[0-9])", None, ["letter", "digit", None]),
        ("z*", None, [None, None, None]),
        ("b(z)?", None, [None, None, None]),
        ("[a-c]", [1, 2], ["2 or more", "2 or more", "1 or fewer"]),
        ("[a-c]", [0, 3], ["3 or more", "2", "0"]),
    ],
)
def test_a_label_is_a_group_a_match_or_a_count(pattern, count, found):
    assert find_labels(["abc", "ab1", ""], pattern, count) == found


def test_classes_are_the_most_frequent_ones_of_training(data: Path) -> None:
    captions = first_captions(open_corpus(data / "strokes").splits["train"])
    counts = {stroke: sum(text[0] == stroke for text in captions) for stroke in "横竖撇捺"}
    ordered = sorted(counts, key=lambda stroke: (-counts[stroke], stroke))
    two = write_labelled_corpus("two", "strokes", LabelRule("captions", "^.", classes=2), data)
    assert sorted(two["labels"]) == sorted(ordered[:2])
    assert two["splits"]["train"]["rows"] == sum(counts[each] for each in ordered[:2])
    rejected = sum(two["quarantine"].values())
    assert two["quarantine"].keys() == {"a label of no class"}
    assert two["rows_in"] == two["rows_out"] + rejected
    lines = (data / "two" / "quarantine.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == rejected
    assert json.loads(lines[0])["reason"] == "a label of no class"
    named = LabelRule("captions", "^.", classes=["竖", "横"], other="rest")
    whole = write_labelled_corpus("named", "strokes", named, data)
    assert whole["labels"] == ["竖", "横", "rest"]
    assert whole["rows_in"] == whole["rows_out"]
    assert set(names_of(open_corpus(data / "named"), "train")) == {"竖", "横", "rest"}


def test_rows_for_pretraining_alone_get_no_label(data: Path) -> None:
    made = write_labelled_corpus("lengths", "headings", LabelRule("text", "..", count=[1, 3]), data)
    assert "pretrain" in open_corpus(data / "headings").splits
    assert "pretrain" not in made["splits"]
    assert "text" in made["schema"], "the text is the input itself"


def test_counts_are_ordered_by_number(data: Path) -> None:
    rule = LabelRule("code", "[a-z]", count=[20, 200])
    made = write_labelled_corpus("counts", "functions", rule, data)
    numbers = [int(label.split()[0]) for label in made["labels"]]
    assert numbers == sorted(numbers)
    assert len(numbers) > 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "options.a: column is missing"),
        ({"column": "captoins"}, "has no column 'captoins'; did you mean 'captions'?"),
        ({"column": "frames"}, "frames of strokes holds fixed_size_list"),
        ({"column": "captions", "pattern": "("}, "no regular expression"),
        ({"column": "captions", "pattern": "x"}, "no row is left to train on"),
        ({"column": "captions", "count": [1, 3]}, "count needs a pattern"),
        ({"column": "captions", "pattern": "x", "count": [3, 1]}, "count is [3, 1]"),
        ({"column": "captions", "classes": 0}, "classes is 0"),
        (
            {"column": "captions", "pattern": "^.", "classes": ["x"]},
            "no training row has the label 'x'",
        ),
        ({"column": "captions", "pattern": "^.", "classes": ["横", "横"]}, "a name repeats"),
        ({"column": "captions", "pattern": "^.", "other": "横"}, "is the name of another class"),
        ({"column": "captions", "patern": "^."}, "options.a: unknown key 'patern'"),
    ],
)
def test_a_wrong_rule_has_one_message(rule, message, data, tmp_path, run_root, capsys):
    file = tmp_path / "rule.yaml"
    file.write_text(yaml.safe_dump({"corpus": {"a": "labels:strokes"}, "options": {"a": rule}}))
    assert prepare.main(["--data", str(data), "--config", str(file)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (data / "a").exists()


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("strokes=labels:drawings", "strokes: a built-in corpus"),
        ("a=labels:nothing", "nothing: missing"),
        ("full=labels:strokes", "full is no corpus of labels"),
        ("b=labels:shapes", "shapes is made from drawings"),
    ],
)
def test_a_wrong_source_has_one_message(corpus, message, data, run_root, capsys):
    write_labelled_corpus("shapes", "drawings", SHAPES, data)
    (data / "full").mkdir(exist_ok=True)
    (data / "full" / "notes.txt").write_text("mine")
    name = corpus.split("=")[0]
    given = ["--data", str(data), "--corpus", corpus, f"--options.{name}.column", "captions"]
    assert prepare.main(given) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_labels_are_not_written_to_a_store(run_root, capsys):
    given = ["--corpus", "a=labels:strokes", "--options.a.column", "captions"]
    assert prepare.main(["--data", "s3://a/b", *given]) == 2
    assert "labels:CORPUS writes to a directory only" in " ".join(capsys.readouterr().err.split())


def test_a_pattern_that_backtracks_is_stopped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_corpus, "SECONDS", 0.5)
    rule = LabelRule("captions", "(?:.?|.?){40}X")
    with pytest.raises(UserError, match=r"options.a.pattern: .* longer than 0.5 s. Give another"):
        write_labelled_corpus("a", "strokes", rule, data)
    assert not (data / "a").exists()


def test_two_tasks_train_with_folds_and_verify_traces_their_rows(data, run_root):
    write_labelled_corpus(
        "first_stroke", "strokes", LabelRule("captions", "^.", other="none"), data
    )
    write_labelled_corpus("shapes", "drawings", SHAPES, data)
    tasks = {"first_stroke": ("first_stroke", "video"), "shape": ("shapes", "image")}
    options: dict[str, object] = {
        key: value for key, value in SMALL_RUN.items() if not key.startswith("tasks.")
    }
    names = ", ".join([*DEFAULT_SKILLS, *tasks])
    options |= {"model.skills": f"[{names}]", "fold.count": 3, "fold.number": 1}
    options["fold.validation_share"] = 0.3
    for name, (corpus, modality) in tasks.items():
        options |= {f"tasks.{name}.corpus": corpus, f"tasks.{name}.batch_size": 4}
        towers = f"{{input: {{modality: {modality}, skills: [general, {modality}, {name}]}}}}"
        options[f"model.tasks.{name}"] = f"{{objective: classification, towers: {towers}}}"
    given = ["--data", str(data), "--training.steps", "2", "--training.workers", "1"]
    assert finetune.main([*given, *option_arguments(options), "--name", "two"]) == 0
    checks = {
        check.subject: check.state
        for check in verify.verify(verify.VerifyConfig(str(run_root / "two"), str(data)))
    }
    assert checks["corpus shapes"] == checks["corpus drawings"] == "ok"
    assert checks["corpus first_stroke"] == checks["corpus strokes"] == "ok"
    change_corpus(data / "drawings", lambda _, table: table.slice(1))
    changed = verify.verify(verify.VerifyConfig(str(run_root / "two"), str(data)))
    assert {check.subject for check in changed if check.state == "altered"} == {"corpus drawings"}


def test_each_corpus_of_the_stream_has_a_task_with_a_skill_of_its_own() -> None:
    stream = yaml.safe_load((CONFIGS / "prepare" / "stream.yaml").read_text("utf-8"))
    assert len(stream["corpus"]) == 24
    assert stream["options"].keys() == stream["corpus"].keys()
    config = configuration.parse_config(FinetuneConfig, ["--config", "tasks/stream"], "test")
    assert list(config.tasks) == list(stream["corpus"])
    for name in stream["corpus"]:
        assert config.tasks[name].corpus == name
        plan = config.model.tasks[name].towers["input"]
        assert set(plan.skills) == {"general", plan.modality, name}
    single = yaml.safe_load((CONFIGS / "prepare" / "stroke-counts.yaml").read_text("utf-8"))
    for key in ("corpus", "options"):
        assert single[key] == {"stroke_counts": stream[key]["stroke_counts"]}
