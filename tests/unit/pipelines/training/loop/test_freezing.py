"""Training only some files of a model; the others stay bitwise unchanged."""

from pathlib import Path

import pytest
import torch

from pipelines.training.config.run import FinetuneConfig, TaskTraining
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config, write_corpora


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", rows=16, test_rows=4)


def config_for(data: Path, *only: str, **training: object) -> FinetuneConfig:
    return small_config(data, **({"steps": 6, "trainable": list(only)} | training))


def changed(config: FinetuneConfig, run: Path | None = None) -> set[str]:
    """Files with a weight that training changed."""
    old = dict(build_model(config).double().named_parameters())
    after = train_model(ResolvedRun(config, run)).model
    return {after.file_of(n) for n, p in after.named_parameters() if not torch.equal(p, old[n])}


def test_only_trainable_files_change_also_in_the_average(data: Path, tmp_path: Path) -> None:
    config = config_for(data, "skill-text", "head-text_classification", ema=0.5)
    config.tasks = {"text_classification": config.tasks["text_classification"]}
    assert changed(config, tmp_path) == {"skill-text", "head-text_classification"}


def test_eval_only_tasks_take_no_steps(data: Path) -> None:
    config = config_for(data)
    for name, task in config.tasks.items():
        task.eval_only = name != "text_to_code"
    assert set(config.trained) == {"text_to_code"}
    assert set(config.measured) == set(config.tasks)
    assert "head-speech_recognition" not in changed(config)
    assert set(train_model(ResolvedRun(config)).losses) == {"text_to_code"}


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("skill-texd", "no file 'skill-texd'; did you mean 'skill-text'"),
        ("head-text_classification", "nothing to train for speech_recognition, which activates"),
    ],
)
def test_untrainable_selection_is_rejected(data: Path, only: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_model(ResolvedRun(config_for(data, only)))


def test_no_task_to_train(data: Path) -> None:
    config = config_for(data)
    for task in config.tasks.values():
        task.eval_only = True
    with pytest.raises(UserError, match="no task to train"):
        train_model(ResolvedRun(config))
    with pytest.raises(ValueError, match="set only one"):
        TaskTraining("x", auxiliary=True, eval_only=True)
