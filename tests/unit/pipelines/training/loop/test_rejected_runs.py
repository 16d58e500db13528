"""A run that is rejected for its data leaves no folder and no MLflow run."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipelines import finetune
from pipelines.training.loop.run import warn_of_idle_tasks
from tests.helpers.prepared_corpora import change_corpus, set_column
from tests.helpers.small_corpora import write_corpora
from tests.helpers.small_run import SMALL_RUN, option_arguments


def drop_column(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns([name])


def replace_values(name: str, value: object) -> Callable[[pa.Table], pa.Table]:
    """Return an edit that gives the last row another value."""

    def edit(table: pa.Table) -> pa.Table:
        return set_column(table, name, [*table.column(name).to_pylist()[:-1], value])

    return edit


@pytest.mark.parametrize(
    ("corpus", "split", "edit", "message"),
    [
        ("headings", "train", replace_values("label", 99), "column 'label'"),
        ("drawings", "train", replace_values("caption_tokens", []), "has no caption to search"),
        ("drawings", "train", drop_column("pixels"), "drawings/train has no column 'pixels'"),
        ("headings", "test", replace_values("label", None), "an id is empty"),
        ("headings", "test", drop_column("label"), "headings/test has no column 'label'"),
    ],
)
def test_a_run_with_unreadable_rows_leaves_nothing(
    corpus, split, edit, message, tmp_path, run_root, capsys
):
    data = write_corpora(tmp_path / "data")
    change_corpus(data / corpus, lambda name, rows: edit(rows) if name == split else rows)
    words = ["--name", "rejected", "--data", str(data), *option_arguments(SMALL_RUN)]
    assert finetune.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (run_root / "rejected").exists()
    assert not list(run_root.glob("mlflow*"))


def test_an_idle_task_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    training = SimpleNamespace(steps=7)
    loader = SimpleNamespace(count_steps=lambda steps: {"idle": 0, "busy": steps})
    run: Any = SimpleNamespace(
        config=SimpleNamespace(training=training, init_from=None), dataloader=loader
    )
    for _ in range(2):
        warn_of_idle_tasks(run)
    assert capsys.readouterr().err.count("no step trains idle") == 1
