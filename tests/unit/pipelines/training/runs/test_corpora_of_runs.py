"""Commands about a run read the corpora that its configuration names."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import evaluate, export, predict, register, search, verify
from pipelines.serving.batch_prediction import BatchRequest, open_request_predictor
from pipelines.serving.served_model import ServedModel, ServedModelConfig
from pipelines.training.runs.model_source import resolve_model
from skillnet.model import SkillNet
from skillnet_platform.storage import data_root
from skillnet_studies import interpret
from tests.helpers.readable_corpora import config, write_corpora

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
    write_corpora(place / "prepared")
    SkillNet(config()).save_pretrained(place / "run" / "model")
    tasks = {name: {"corpus": corpus} for name, corpus in TASKS.items()}
    settings = {"data": str(place / "prepared"), "tasks": tasks, "training": {}, "seed": 0}
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(place / "home"))
        yield place / "run"


def test_an_option_comes_before_the_run_and_the_run_before_the_usual_place(
    run: Path, tmp_path: Path
) -> None:
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
def test_a_command_about_a_run_needs_no_option(
    command: Any, words: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main([*words, str(run)]) == 0


def test_predictions_of_files_and_servers_read_them_too(run: Path) -> None:
    assert ServedModel(ServedModelConfig(str(run))).describe()["search"]
    predictor, _ = open_request_predictor(BatchRequest(str(run), None, "out"))
    assert predictor.names["text_classification"]


def test_a_registration_reads_them_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(BaseException):
        """The registration was called."""

    def stop(source: Any, data: Any, **options: Any) -> None:
        raise StoppedError(str(data))

    monkeypatch.setattr(register, "register_model", stop)
    with pytest.raises(StoppedError, match=str(run.parent / "prepared")):
        register.main([str(run)])
