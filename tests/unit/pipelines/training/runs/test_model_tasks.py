"""Tasks of a run's model: only those that the run names, with the outputs of their corpora.

Commands about a run read the corpora that its configuration names.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import evaluate, predict, register, verify
from pipelines.serving.batch_prediction import BatchRequest, open_request_predictor
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.loop.run import validate_run
from pipelines.training.runs.model_source import resolve_model
from skillnet.model import SkillNet
from skillnet.skills import known_tasks
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root
from skillnet_serving import export, search
from skillnet_serving.server.config import ServeConfig
from skillnet_serving.server.served_model import ServedModel
from skillnet_studies import interpret
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.readable_corpora import config
from tests.helpers.readable_corpora import write_corpora as write_readable_corpora
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


def test_a_stored_configuration_resolves_to_itself(data, run_root, tmp_path):
    change_corpus(data / "tnews", labels=["gut", "schlecht"])
    first = resolve_run(own(data, "--tasks.mood.corpus", "tnews", "--name", "mine"))
    path = tmp_path / "config.yaml"
    path.write_text(configuration.to_yaml(first.config), encoding="utf-8")
    said = ["--config", str(path)]
    again = configuration.parse_config(FinetuneConfig, said, "skillnet finetune", "Train.")
    assert set(again.tasks) == {"mood"}
    assert resolve_run(again).identity == first.identity


TASKS = {
    "text_classification": "headings",
    "speech_recognition": "syllables",
    "text_to_image": "drawings",
    "text_to_video": "strokes",
    "text_to_code": "functions",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose corpora are not below the run root."""
    place = tmp_path_factory.mktemp("elsewhere")
    write_readable_corpora(place / "prepared")
    SkillNet(config()).save_pretrained(place / "run" / "model")
    tasks = {name: {"corpus": corpus} for name, corpus in TASKS.items()}
    settings = {"data": str(place / "prepared"), "tasks": tasks, "training": {}, "seed": 0}
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(place / "home"))
        yield place / "run"


def test_an_option_comes_before_the_run_and_the_run_before_the_usual_place(run, tmp_path):
    source = resolve_model(str(run))
    assert source.find_corpora(None) == run.parent / "prepared"
    assert source.find_corpora(str(tmp_path)) == tmp_path
    assert source.find_corpora("s3://bucket/corpora") == "s3://bucket/corpora"
    # A run that was copied from a machine with other places.
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    usual = data_root()
    for data, expected in (("/none/here", usual), ("s3://a/b", "s3://a/b"), (None, usual)):
        (copy / "config.yaml").write_text(yaml.safe_dump(settings | {"data": data}))
        assert resolve_model(str(copy)).find_corpora(None) == expected


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (predict, ["--text", "天文研究", "--task", "text_classification", "--model"]),
        (search, ["红色", "--task", "text_to_image", "--html", "page.html", "--model"]),
        (export, ["--output", "exported", "--model"]),
        (verify, ["--model"]),
        (evaluate, ["--tasks", "text_classification", "--simple_baselines", "false", "--model"]),
        (interpret, ["--tasks", "text_classification", "--swaps", "false", "--model"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_command_about_a_run_needs_no_option(command, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([*words, str(run)]) == 0


def test_predictions_of_files_and_servers_read_them_too(run: Path) -> None:
    assert ServedModel(ServeConfig(str(run))).describe()["search"]
    predictor, _ = open_request_predictor(BatchRequest(str(run), None, "out"))
    assert predictor.tasks["text_classification"]["names"]


def test_a_registration_reads_them_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(BaseException):
        """The registration was called."""

    def stop(source: Any, data: Any, **options: Any) -> None:
        raise StoppedError(str(data))

    monkeypatch.setattr("pipelines.serving.registration.register_model", stop)
    with pytest.raises(StoppedError, match=str(run.parent / "prepared")):
        register.main([str(run)])
