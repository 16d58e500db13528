"""Corpora of two media from the command line to a searched and exported model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.io.wavfile
import torch
import yaml
from PIL import Image

from pipelines import prepare
from pipelines.data.preprocessing.paired_corpus import take_rows, write_paired_corpus
from pipelines.data.shards.dataset import open_corpus
from pipelines.serving.bundle import list_licences, open_predictor
from pipelines.serving.inputs import read_input_item
from pipelines.training.runs.model_source import resolve_model
from skillnet import SkillNet
from skillnet.skills import known_tasks
from skillnet_platform.errors import UserError
from skillnet_serving import export
from skillnet_serving.search import SearchConfig, search_corpus
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.readable_corpora import config, write_corpora, write_labelled_corpora


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_corpora(tmp_path_factory.mktemp("paired") / "corpora")


def test_a_pair_is_prepared_searched_and_exported(data, tmp_path, run_root, capsys):
    # One sound for the three drawings of a group.
    change_corpus(data / "syllables", lambda _, table: table.take(list(range(0, len(table), 3))))
    given = ["--pair", "both=drawings+syllables", "--data", str(data)]
    assert prepare.main(given) == 0
    capsys.readouterr()
    corpus = open_corpus(data / "both")
    task = known_tasks()[corpus.task]
    torch.manual_seed(0)
    SkillNet(replace(config(), tasks={"heard": task})).save_pretrained(tmp_path / "run" / "model")
    settings = {"training": {}, "tasks": {"heard": {"corpus": "both"}}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    wave = 9000 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    scipy.io.wavfile.write(tmp_path / "a.wav", 16000, wave.astype(np.int16))
    rows = corpus.splits["train"].table()
    for file, column in (("a.wav", "key"), ("a.png", "paired_key")):
        found = search_corpus(
            SearchConfig(
                file=str(tmp_path / file),
                model=str(tmp_path / "run"),
                data=str(data),
                splits=["train"],
                html=str(tmp_path / f"{file}.html"),
                top=500,
            )
        )
        # Each row of the ranked medium once, and named by its own key.
        keys = rows[column].to_pylist()
        assert len(keys) > len(set(keys)) or column == "key"
        assert sorted(hit.key for hit in found.hits) == sorted(set(keys))
        assert all(keys[hit.row] == hit.key for hit in found.hits)
        page = (tmp_path / f"{file}.html").read_text(encoding="utf-8")
        assert len(set(re.findall('<img src="data:image/png[^"]*"', page))) > 3
    predictor = open_predictor(resolve_model(str(tmp_path / "run")), data)
    items = [read_input_item(tmp_path / file) for file in ("a.png", "a.wav")]
    assert [len(found.embedding) for found in predictor.predict(items)] == [8, 8]
    target = ["--output", str(tmp_path / "hf"), "--model", str(tmp_path / "run")]
    assert export.main(["heard", *target, "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] == 0
    model = SkillNet.from_pretrained(tmp_path / "hf")
    assert model.encode_image([tmp_path / "a.png"]).shape == (1, 8)
    assert "openmoji" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


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
def test_a_wrong_pair_has_one_message(arguments, message, data, run_root, capsys):
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
    change_corpus(folder / "drawings", preprocessing=image)
    change_corpus(folder / "syllables", preprocessing=sound)
    for pair in ("drawings+syllables", "syllables+drawings"):
        found = write_paired_corpus("both", pair, folder)["preprocessing"]
        wanted = {"size": 32, "fit": "pad", "max_seconds": 1.5, "deviation": 2.0}
        assert {key: found[key] for key in wanted} == wanted


def test_partners_in_another_split_are_reported(tmp_path, capsys):
    folder = write_labelled_corpora(tmp_path / "corpora")
    others = {"train": ["a", "b", "c"], "validation": ["d"], "test": ["e"]}

    def caption_rows(split: str, table: pa.Table) -> pa.Table:
        chosen = table.slice(0, len(others[split]))
        captions = pa.array([[each] for each in others[split]])
        return chosen.set_column(table.column_names.index("captions"), "captions", captions)

    change_corpus(folder / "syllables", caption_rows)
    others |= {"train": ["a", "d", "e"]}
    change_corpus(folder / "strokes", caption_rows)
    manifest = write_paired_corpus("both", "syllables+strokes", folder)
    assert manifest["splits"].keys() == {"train", "validation", "test"}
    others |= {"train": ["d", "d", "d"], "validation": ["a"], "test": ["x"]}
    change_corpus(folder / "strokes", caption_rows)
    with pytest.raises(UserError, match="2 rows have their partner in another split"):
        write_paired_corpus("both", "syllables+strokes", folder)


def test_rows_are_taken_in_the_given_order() -> None:
    table = pa.concat_tables([pa.table({"n": [0, 1, 2]}), pa.table({"n": [3, 4]})])
    rows = np.array([4, 0, 3, 0, 2])
    assert take_rows(table, rows)["n"].to_pylist() == rows.tolist()


def test_licences_of_joined_corpora_are_listed_once() -> None:
    found = list_licences(["strokes", "radicals", "mine"])
    assert found
    assert len(set(found)) == len(found)
