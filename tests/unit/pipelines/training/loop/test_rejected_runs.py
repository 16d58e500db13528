"""A run that is rejected for its data leaves no folder and no MLflow run."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import finetune
from pipelines.data.shards.format import manifest_digest, write_shard
from tests.helpers.small_corpora import write_corpora
from tests.helpers.small_run import SMALL_RUN, option_arguments


def drop_column(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns([name])


def replace_values(name: str, value: object) -> Callable[[pa.Table], pa.Table]:
    """Return an edit that gives the last row another value."""

    def edit(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        values = [*table.column(name).to_pylist()[:-1], value]
        index = table.schema.get_field_index(name)
        return table.set_column(index, field, pa.array(values, field.type))

    return edit


def rewrite_split(corpus: Path, split: str, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite the shards of a split, with a manifest that agrees with them."""
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["splits"][split]["shards"]:
        path = corpus / entry["file"]
        table = edit(pa.ipc.open_file(path.read_bytes()).read_all())
        path.unlink()
        entry.update(write_shard(table, path))
    manifest["digest"] = manifest_digest(manifest)
    (corpus / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


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
    corpus: str,
    split: str,
    edit: Callable[[pa.Table], pa.Table],
    message: str,
    tmp_path: Path,
    run_root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_corpora(tmp_path / "data")
    rewrite_split(data / corpus, split, edit)
    words = ["--name", "rejected", "--data", str(data), *option_arguments(SMALL_RUN)]
    assert finetune.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (run_root / "rejected").exists()
    assert not list(run_root.glob("mlflow*"))
