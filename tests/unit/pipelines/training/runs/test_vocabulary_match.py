"""Every command that reads a corpus with a model compares their tokenizers and names."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipelines.data.tokenizer.selection import convert_tokenizer
from pipelines.data.tokenizer.training import train_tokenizer
from pipelines.evaluate import EvaluateConfig, evaluate_trained_model
from pipelines.serving import bundle
from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.run import validate_run
from pipelines.training.loop.setup import build_model, dry_run_init
from pipelines.training.runs.bundle_manifest import write_sealed
from pipelines.training.runs.layout import create_run_folder
from pipelines.training.runs.model_source import resolve_model
from pipelines.training.runs.vocabulary_match import list_names
from skillnet.serialization import describe_files, read_manifest, read_vocabulary
from skillnet.systems import load_model
from skillnet_platform.errors import UserError
from skillnet_platform.storage import sha256_file
from skillnet_serving.search import SearchConfig, search_corpus
from skillnet_studies.interpretation.ablation import find_measured_splits
from skillnet_studies.interpretation.gradient_share import measure_gradient_share
from tests.helpers.prepared_corpora import change_corpus, set_column
from tests.helpers.small_corpora import small_config, write_corpora

TASK = "text_classification"
CLASSES = [f"class {number}" for number in range(15)]
SPEECH = "speech_recognition"
SYMBOLS = [f"symbol {number}" for number in range(61)]


def derive_corpus(
    data: Path, source: str, name: str, names: Sequence[str] = (), **changes: Any
) -> None:
    """Copy a corpus under another name; with the ids of ``names``, if given.

    Names that the source lacks get the ids of its names at their positions.
    """
    shutil.copytree(data / source, data / name)
    # Symbols are counted from 1.
    key, column, first = ("symbols", "symbols", 1)
    if source != "syllables":
        key, column, first = ("labels", "label", 0)
    if not names:
        change_corpus(data / name, corpus=name, **changes)
        return
    old = change_corpus(data / name)[key]
    ids = {
        first + number: first + (names.index(own) if own in names else number % len(names))
        for number, own in enumerate(old)
    }

    def rename(_: str, table: pa.Table) -> pa.Table:
        values = [
            [ids[each] for each in row] if isinstance(row, list) else ids[row]
            for row in table.column(column).to_pylist()
        ]
        return set_column(table, column, values)

    change_corpus(data / name, rename, **{key: list(names), "corpus": name, **changes})


def tokenizer_entry(sha256: str) -> dict[str, Any]:
    return {"file": "tokenizer.json", "sha256": sha256, "vocab_size": 64}


def small_run(data: Path, **corpora: str) -> FinetuneConfig:
    """A run of some tasks of those corpora."""
    config = small_config(data, steps=40, precision="fp64", lr=1e-2)
    config.tasks = {
        task: TaskTraining(corpus, weight=1.0, batch_size=8) for task, corpus in corpora.items()
    }
    tasks = {task: config.model.tasks[task] for task in corpora}
    return replace(config, model=replace(config.model, tasks=tasks, vocab_size=400))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, and a saved model of their classes and symbols."""
    place = tmp_path_factory.mktemp("trained")
    data = write_corpora(place / "corpora")
    config = small_run(data, text_classification="headings", speech_recognition="syllables")
    train_model(ResolvedRun(config)).model.save_pretrained(place / "model")
    return place


@pytest.fixture
def data(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "corpora", tmp_path / "corpora"))


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "model", tmp_path / "model"))


def evaluate(model: Path, data: Path, **corpora: str) -> dict[tuple[str, str], float]:
    config = EvaluateConfig(
        model=str(model),
        data=str(data),
        corpora=corpora,
        tasks=list(corpora),
        simple_baselines=False,
        bootstrap_samples=0,
        precision="fp64",
        output=str(model.parent / "evaluation.csv"),
        log=False,
    )
    rows = evaluate_trained_model(config).rows
    return {(row["task"], row["metric"]): row["value"] for row in rows}


def test_a_saved_model_records_its_tokenizer_and_the_names_of_its_outputs(data, tmp_path):
    derive_corpus(data, "headings", "texts", tokenizer=tokenizer_entry("a" * 64))
    config = small_run(data, text_classification="texts", speech_recognition="syllables")
    config = replace(config, training=replace(config.training, steps=1))
    run = ResolvedRun(config, tmp_path / "run")
    train_model(run).model.save_pretrained(tmp_path / "model")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    for folder in (tmp_path / "model", checkpoint):
        vocabulary = read_vocabulary(folder, read_manifest(folder))
        assert vocabulary.tokenizer == "a" * 64
        assert vocabulary.outputs == {TASK: tuple(CLASSES), SPEECH: tuple(SYMBOLS)}
        assert load_model(folder).vocabulary == vocabulary


def test_the_same_names_in_another_order_are_mapped(data: Path, model: Path) -> None:
    derive_corpus(data, "headings", "reversed", CLASSES[::-1])
    derive_corpus(data, "syllables", "spoken", [*SYMBOLS[7:], *SYMBOLS[:7]])
    before = evaluate(model, data, text_classification="headings", speech_recognition="syllables")
    after = evaluate(model, data, text_classification="reversed", speech_recognition="spoken")
    assert before[TASK, "accuracy"] > 0.2, "a wrong mapping would not show"
    assert after == pytest.approx(before, abs=1e-12)


@pytest.mark.parametrize(
    ("task", "source", "names"),
    [(TASK, "headings", ["gut", "schlecht"]), (SPEECH, "syllables", [*SYMBOLS[:-1], "ß"])],
)
def test_other_names_are_rejected_with_both_lists(task, source, names, data, model):
    derive_corpus(data, source, "other", names)
    with pytest.raises(UserError) as caught:
        evaluate(model, data, **{task: "other"})
    message = str(caught.value)
    known = CLASSES if task == TASK else SYMBOLS
    assert list_names(names) in message
    assert list_names(known) in message
    assert f"--tasks.{task}.corpus other" in message


@pytest.fixture
def texts(data: Path, tmp_path: Path) -> Path:
    """A run's folder: a model of texts, with the tokenizer beside its corpora."""
    file = data / "tokenizer.json"
    file.write_text(train_tokenizer(["一二三四五六七八九十"], [], size=400), encoding="utf-8")
    for source, name in (("headings", "texts"), ("drawings", "pictures")):
        derive_corpus(data, source, name, tokenizer=tokenizer_entry(sha256_file(file)))
    config = small_run(data, text_classification="texts", text_to_image="pictures")
    config = replace(config, training=replace(config.training, steps=2))
    run = tmp_path / "run"
    train_model(ResolvedRun(config, run)).model.save_pretrained(run / "model")
    create_run_folder(config, run)
    return run


def other_texts(data: Path, **more: Any) -> Path:
    """The same corpora below another directory, prepared with another tokenizer."""
    other = data.with_name("other")
    for name in ("texts", "pictures"):
        shutil.copytree(data / name, other / name)
        change_corpus(other / name, tokenizer=tokenizer_entry("b" * 64), **more)
    return other


def meet(place: str, run: Path, data: Path, other: Path) -> None:
    """Bring the model of texts and the corpora of another tokenizer together."""
    source = resolve_model(str(run))
    model = load_model(run / "model")
    corpora = {TASK: "texts", "text_to_image": "pictures"}
    if place == "evaluate":
        evaluate(run / "model", other, text_classification="texts")
    elif place == "interpret":
        find_measured_splits(model, other, [TASK], "test", corpora)
    elif place == "gradients":
        measure_gradient_share(model, other, [TASK], corpora=corpora)
    elif place == "from":
        config = replace(small_run(other, text_classification="texts"), init_from=str(run))
        dry_run_init(config)
    elif place == "bundle":
        bundle.build_bundle(source, other, run / "bundle")
    else:
        bundle.build_bundle(source, data, run / "bundle")
        search_corpus(
            SearchConfig(["一"], model=str(run / "bundle"), data=str(other), task="text_to_image")
        )


@pytest.mark.parametrize(
    "place", ["evaluate", "interpret", "gradients", "from", "bundle", "search"]
)
def test_another_tokenizer_is_rejected_with_the_command_that_repairs_it(
    place, data, texts, run_root
):
    file = data / "tokenizer.json"
    other = other_texts(data, preprocessing={"reader": "folder"})
    with pytest.raises(UserError) as caught:
        meet(place, texts, data, other)
    message = str(caught.value)
    assert "b" * 16 in message
    assert sha256_file(file)[:16] in message
    name = "pictures" if place == "search" else "texts"
    given = texts / "bundle" / "tokenizer.json" if place == "search" else file
    directory = f"{other}-{sha256_file(file)[:8]}"
    expected = f"prepare --corpus {name}=folder:PATH --tokenizer {given} --data {directory}"
    assert message.endswith(expected)


def test_a_given_tokenizer_of_this_project_keeps_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(train_tokenizer(["一二三四"], ["abc"], ["词语"], size=400), encoding="utf-8")
    assert convert_tokenizer(file).encode() == file.read_bytes()


def test_a_bundle_with_another_tokenizer_is_rejected(data, texts, run_root):
    folder = bundle.build_bundle(resolve_model(str(texts)), data, texts / "bundle")
    predictor = bundle.open_bundle(folder)
    assert predictor.tasks[TASK]["names"] == CLASSES
    (folder / "tokenizer.json").write_text(train_tokenizer(["天"], [], size=400), "utf-8")
    manifest = read_manifest(folder)
    manifest["serving"]["files"] |= describe_files(folder, ["tokenizer.json"])
    write_sealed(folder, manifest)
    with pytest.raises(UserError, match="the model was trained with the tokenizer"):
        bundle.open_bundle(folder)


def test_a_bundle_names_the_outputs_of_its_model(data: Path, texts: Path, run_root: Path) -> None:
    """The corpus may list the same classes in another order by now."""
    shutil.rmtree(data / "texts")
    entry = tokenizer_entry(sha256_file(data / "tokenizer.json"))
    derive_corpus(data, "headings", "texts", CLASSES[::-1], tokenizer=entry)
    folder = bundle.build_bundle(resolve_model(str(texts)), data, texts / "bundle")
    assert bundle.open_bundle(folder).tasks[TASK]["names"] == CLASSES


# -- --from ----------------------------------------------------------------------------------------


def tuned(data: Path, model: Path, task: str, corpus: str, outputs: int) -> FinetuneConfig:
    config = replace(small_run(data, **{task: corpus}), init_from=str(model))
    spec = replace(config.model.tasks[task], outputs=outputs)
    return replace(config, model=replace(config.model, tasks={task: spec}))


@pytest.mark.parametrize(
    ("task", "source", "names"),
    [
        (TASK, "headings", ["bad", "good", "neutral"]),
        (TASK, "headings", [f"other {number}" for number in range(15)]),
        (SPEECH, "syllables", ["a", "b", "c", "d"]),
    ],
)
def test_a_head_of_other_names_starts_fresh_and_the_log_says_so(task, source, names, data, model):
    derive_corpus(data, source, "other", names)
    config = tuned(data, model, task, "other", len(names))
    run = ResolvedRun(config)
    validate_run(run)
    report = run.init_report
    assert f"head-{task}" in report.fresh
    assert "shared" in report.taken
    (line,) = report.describe()[1:]
    known = CLASSES if task == TASK else SYMBOLS
    assert line.startswith(f"{task}: ")
    assert line.index(list_names(known)) < line.index(list_names(names))
    assert "starts from random weights" in line
    started = build_model(config)
    assert started.vocabulary.outputs == {task: tuple(names)}
    assert train_model(ResolvedRun(replace(config, training=replace(config.training, steps=2))))


@pytest.mark.parametrize(
    ("task", "source", "names"),
    [(TASK, "headings", CLASSES[::-1]), (SPEECH, "syllables", [*SYMBOLS[7:], *SYMBOLS[:7]])],
)
def test_a_head_of_the_same_names_moves_to_the_order_of_the_corpus(
    task, source, names, data, model
):
    derive_corpus(data, source, "other", names)
    config = tuned(data, model, task, "other", len(names))
    report = dry_run_init(config)
    assert f"head-{task}" in report.taken
    assert len(report.describe()) == 1
    first, known = (0, CLASSES) if task == TASK else (1, SYMBOLS)
    rows = [*range(first), *(first + known.index(name) for name in names)]
    before, after = dict(load_model(model).named_parameters()), build_model(config)
    for name, parameter in after.heads.named_parameters(prefix="heads"):
        assert torch.equal(parameter, before[name][rows].float())


def test_a_task_that_is_only_evaluated_needs_the_names_of_its_head(data: Path, model: Path) -> None:
    derive_corpus(data, "headings", "other", ["bad", "good"])
    config = tuned(data, model, TASK, "other", 2)
    speech = TaskTraining("syllables", weight=1.0, batch_size=8)
    config.tasks[TASK].eval_only = True
    config = replace(config, tasks=config.tasks | {SPEECH: speech})
    config.model.tasks[SPEECH] = small_config(data).model.tasks[SPEECH]
    with pytest.raises(UserError, match=r"tasks.text_classification: .*only evaluated"):
        dry_run_init(config)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (CLASSES[::-1], r"tasks.text_classification: .* in another order, and head-.* is frozen"),
        (["bad", "good"], r"tasks.text_classification: .*and its head is frozen"),
    ],
)
def test_a_frozen_head_needs_the_names_and_their_order(names, message, data, model):
    """A growth finds changed bytes of a frozen file only after its training."""
    derive_corpus(data, "headings", "other", names)
    config = tuned(data, model, TASK, "other", len(names))
    config = replace(config, training=replace(config.training, trainable=["skill-text"]))
    with pytest.raises(UserError, match=message):
        dry_run_init(config)
    config.training.trainable.append(f"head-{TASK}")
    assert dry_run_init(config) is not None
