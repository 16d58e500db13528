"""Tasks of a run's model: only those that the run names, with the outputs of their corpora."""

from pathlib import Path

import pytest

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.loop.run import validate_run
from skillnet.skills import known_tasks
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.small_corpora import write_corpora


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five corpora named as those of the paper; the audio corpus has 30 symbols."""
    folder = write_corpora(tmp_path / "corpora", rows=5, test_rows=5, shards=1)
    names = {"headings": "tnews", "syllables": "aishell1", "drawings": "aic_icc"}
    for old, new in (names | {"strokes": "vatex", "functions": "pytorrent"}).items():
        (folder / old).rename(folder / new)
    change_corpus(folder / "tnews", labels=[f"{number} news" for number in range(15)])
    symbols = "一二三四五六七八九十百千万亿东南西北中上下左右天地人日月水火"
    change_corpus(folder / "aishell1", symbols=list(symbols))
    return folder


def paper(data: Path, *words: str) -> FinetuneConfig:
    sizes = {"dim": 16, "num_heads": 2, "image_size": 48, "video_frames": 8, "video_size": 32}
    said = ["--config", "paper", "--data", str(data), "--training.use_gpu", "false", *words]
    said += [word for key, value in sizes.items() for word in (f"--model.{key}", str(value))]
    return configuration.parse_config(FinetuneConfig, said, "skillnet finetune", "Train.")


def test_outputs_follow_the_corpora(data: Path, run_root: Path) -> None:
    run = resolve_run(paper(data))
    assert run.config.model.tasks["speech_recognition"].outputs == 30
    assert run.config.model.tasks["text_classification"].outputs == 15
    validate_run(run)
    assert set(run.manifests) == {"tnews", "aishell1", "aic_icc", "vatex", "pytorrent"}


def test_configured_outputs_are_not_changed(data: Path, run_root: Path) -> None:
    run = resolve_run(paper(data, "--model.tasks.speech_recognition.outputs", "40"))
    assert run.config.model.tasks["speech_recognition"].outputs == 40
    with pytest.raises(UserError, match="has 30 symbols, the model was built for 40"):
        validate_run(run)


def test_damaged_corpus_is_rejected_by_name_in_validation(data: Path, run_root: Path) -> None:
    (data / "aishell1" / "manifest.json").write_text("[")
    run = resolve_run(paper(data))
    assert run.config.model.tasks["speech_recognition"].outputs == 61
    with pytest.raises(UserError, match="aishell1"):
        validate_run(run)


def own(data: Path, *words: str) -> FinetuneConfig:
    """A configuration of ``skillnet finetune`` with small sizes and a vocabulary that fits."""
    said = ["--config", "tiny", "--data", str(data), *words]
    return configuration.parse_config(FinetuneConfig, said, "skillnet finetune", "Train.")


def test_a_run_on_an_own_corpus_needs_no_other_corpus(data: Path, run_root: Path) -> None:
    change_corpus(data / "tnews", labels=["gut", "schlecht", "neutral", "unklar"])
    run = resolve_run(own(data, "--tasks.text_classification.corpus", "tnews"))
    assert set(run.config.tasks) == {"text_classification"}
    # The head of a task that no step trains is not built, so it is not saved either.
    assert {name: task.outputs for name, task in run.config.model.tasks.items()} == {
        "text_classification": 4
    }
    assert set(run.manifests) == {"tnews"}


def test_a_task_needs_no_plan_if_its_kind_is_known(data: Path, run_root: Path) -> None:
    change_corpus(data / "aic_icc", task="image_classification", labels=["a", "b", "c"])
    named = resolve_run(own(data, "--tasks.image_classification.corpus", "aic_icc"))
    expected = known_tasks()["image_classification"]
    assert named.config.model.tasks["image_classification"].towers == expected.towers
    assert named.config.model.tasks["image_classification"].outputs == 3
    # A name that the user chooses gets the plan of the corpus' task: two tasks of one kind.
    words = ["--tasks.photos.corpus", "aic_icc", "--tasks.image_classification.corpus", "aic_icc"]
    tasks = resolve_run(own(data, *words)).config.model.tasks
    assert tasks["photos"] == tasks["image_classification"]


def test_unknown_task_is_rejected_by_name(data: Path, run_root: Path) -> None:
    change_corpus(data / "aic_icc", task="something")
    run = resolve_run(own(data, "--tasks.photos.corpus", "aic_icc"))
    with pytest.raises(ValueError, match="unknown task 'photos'"):
        validate_run(run)


def test_a_stored_configuration_resolves_to_itself(
    data: Path, run_root: Path, tmp_path: Path
) -> None:
    change_corpus(data / "tnews", labels=["gut", "schlecht"])
    first = resolve_run(own(data, "--tasks.mood.corpus", "tnews", "--name", "mine"))
    path = tmp_path / "config.yaml"
    path.write_text(configuration.to_yaml(first.config), encoding="utf-8")
    said = ["--config", str(path)]
    again = configuration.parse_config(FinetuneConfig, said, "skillnet finetune", "Train.")
    assert set(again.tasks) == {"mood"}
    assert resolve_run(again).identity == first.identity
