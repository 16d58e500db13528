"""Corpora of two media from the command line to a searched and exported model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import prepare
from pipelines.preprocessing.paired_corpus import take_rows, write_paired_corpus
from pipelines.serving.bundle_facts import list_licences
from pipelines.shards.dataset import open_corpus
from pipelines.shards.format import manifest_digest, write_shard
from skillnet_platform.errors import UserError
from tests.helpers.labelled_corpora import write_labelled_corpora
from tests.helpers.readable_corpora import write_corpora


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_corpora(tmp_path_factory.mktemp("paired") / "corpora")


def edit_corpus(
    folder: Path, edit: Callable[[str, pa.Table], pa.Table] | None = None, **entries: Any
) -> None:
    """Change the rows of each split, and entries of the manifest."""
    corpus = open_corpus(folder)
    manifest = corpus.manifest | entries
    for split, opened in corpus.splits.items() if edit else ():
        assert edit is not None
        table = edit(split, opened.table().combine_chunks())
        # A new file: the present one is mapped.
        shard = write_shard(table, folder / f"{split}-{len(list(folder.iterdir()))}.arrow")
        manifest["splits"][split] = {"rows": len(table), "shards": [shard]}
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_pair_is_prepared(data: Path) -> None:
    assert prepare.main(["--pair", "both=drawings+syllables", "--data", str(data)]) == 0
    assert open_corpus(data / "both").task == "sound_to_image"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "both"], "--pair both: expected NAME=VALUE, for example --pair both=images"),
        (["--pair", "both=drawings"], "--pair both: 'drawings' is no pair"),
        (["--pair", "a=x+y", "--pair", "a=y+z"], "--pair a is given twice"),
        (["--pair", "both=drawings+drawings"], "--pair both: drawings is given twice"),
        (["--pair", "both=drawings+../x"], "--pair both: 'drawings+../x' is no pair"),
        (["--pair", "strokes=drawings+syllables"], "--pair strokes: strokes is another corpus"),
        (["--pair", "both=drawings+nothing"], "nothing: missing"),
        (["--pair", "full=drawings+syllables"], "full is no corpus of pairs"),
        (["--data", "s3://a/b", "--pair", "a=x+y"], "--pair writes to a directory only"),
    ],
)
def test_a_wrong_pair_has_one_message(
    arguments: list[str],
    message: str,
    data: Path,
    run_root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (data / "full").mkdir(exist_ok=True)
    (data / "full" / "notes.txt").write_text("mine")
    assert prepare.main(["--data", str(data), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert (data / "full" / "notes.txt").read_text() == "mine"


def test_numbers_of_groups_are_no_common_items(tmp_path: Path) -> None:
    """Built-in corpora number their groups, each from 0."""
    folder = write_corpora(tmp_path / "corpora")
    with pytest.raises(UserError, match="no row of drawings has a partner"):
        write_paired_corpus("both", "drawings+strokes", folder)


def test_settings_of_a_medium_come_from_its_corpus(tmp_path: Path) -> None:
    """A corpus of the user records settings of all media, its own and unused ones."""
    folder = write_labelled_corpora(tmp_path / "corpora")
    image = {"reader": "folder", "size": 32, "fit": "pad", "max_seconds": 20.0, "trim": False}
    sound = {"reader": "folder", "size": 64, "fit": "crop", "max_seconds": 1.5, "deviation": 2.0}
    edit_corpus(folder / "drawings", preprocessing=image)
    edit_corpus(folder / "syllables", preprocessing=sound)
    for pair in ("drawings+syllables", "syllables+drawings"):
        found = write_paired_corpus("both", pair, folder)["preprocessing"]
        wanted = {"size": 32, "fit": "pad", "max_seconds": 1.5, "deviation": 2.0}
        assert {key: found[key] for key in wanted} == wanted


def test_partners_in_another_split_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_labelled_corpora(tmp_path / "corpora")
    others = {"train": ["a", "b", "c"], "validation": ["d"], "test": ["e"]}

    def caption_rows(split: str, table: pa.Table) -> pa.Table:
        chosen = table.slice(0, len(others[split]))
        captions = pa.array([[each] for each in others[split]])
        return chosen.set_column(table.column_names.index("captions"), "captions", captions)

    edit_corpus(folder / "syllables", caption_rows)
    others |= {"train": ["a", "d", "e"]}
    edit_corpus(folder / "strokes", caption_rows)
    manifest = write_paired_corpus("both", "syllables+strokes", folder)
    assert manifest["splits"].keys() == {"train", "validation", "test"}
    others |= {"train": ["d", "d", "d"], "validation": ["a"], "test": ["x"]}
    edit_corpus(folder / "strokes", caption_rows)
    with pytest.raises(UserError, match="2 rows have their partner in another split"):
        write_paired_corpus("both", "syllables+strokes", folder)


def test_rows_are_taken_in_the_given_order() -> None:
    table = pa.concat_tables([pa.table({"n": [0, 1, 2]}), pa.table({"n": [3, 4]})])
    rows = np.array([4, 0, 3, 0, 2])
    assert take_rows(table, rows)["n"].to_pylist() == rows.tolist()


def test_licences_of_joined_corpora_are_listed_once() -> None:
    found = list_licences(["strokes", "stroke_counts", "mine"])
    assert found
    assert len(set(found)) == len(found)
