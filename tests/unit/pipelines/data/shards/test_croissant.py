"""``skillnet inspect --croissant``: mlcroissant accepts the description of each modality."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import inspect
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import SHARD_TABLE
from pipelines.serving import bundle
from skillnet_platform.errors import UserError
from skillnet_platform.storage import sha256_file
from tests.helpers.readable_corpora import write_corpora

CORPORA = ("headings", "syllables", "drawings", "strokes", "functions")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("described"))


@pytest.mark.parametrize("name", CORPORA)
def test_the_reference_implementation_accepts_the_description(
    name: str, data: Path, tmp_path: Path
) -> None:
    mlcroissant = pytest.importorskip("mlcroissant", reason="needs the extra dev")
    file = tmp_path / "croissant.json"
    inspect.write_croissant(str(data / name), str(file), "CC-BY-4.0")
    read = mlcroissant.Dataset(file).metadata  # raises for an invalid document
    assert {each.split("]")[1][:12] for each in read.ctx.issues.warnings} <= {' Property "h'}
    corpus = open_corpus(data / name)
    assert (read.name, read.license) == (name, ["CC-BY-4.0"])
    assert {each.id for each in read.record_sets} == {f"{split}_rows" for split in corpus.splits}
    fields = {field.name for each in read.record_sets for field in each.fields}
    assert fields == {each for split in corpus.splits.values() for each in split.schema.names}
    files = {each.id: each for each in read.distribution}
    assert files[SHARD_TABLE].sha256 == sha256_file(data / name / SHARD_TABLE)
    for split in corpus.splits:
        (pattern,) = files[split].includes
        assert list((data / name).glob(pattern)), pattern


def test_rejected_rows_and_preparation_are_stated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus(data / "drawings")
    changed = corpus.manifest | {
        "task": "image_classification",
        "quarantine": {"damaged": 3},
        "preprocessing": {"size": 48},
        "sources": [{"file": "a.zip", "sha256": "ab"}, {"file": "b.zip", "sha256": "cd"}],
    }
    described = replace(corpus, manifest=changed)
    monkeypatch.setattr("pipelines.data.shards.dataset.open_corpus", lambda path: described)
    inspect.write_croissant("any", str(tmp_path / "c.json"), "MIT")
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert found["rai:dataLimitations"][0] == "3 rows were left out: damaged"
    assert found["rai:dataUseCases"] == ["image_classification"]
    assert found["rai:dataPreprocessingProtocol"] == ["size: 48"]
    assert found["rai:dataCollection"] == "a.zip, SHA-256 ab; b.zip, SHA-256 cd"


def test_a_licence_is_stated_or_known(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.json"
    inspect.write_croissant(str(data / "drawings"), str(file), None)
    assert "CC" in "".join(json.loads(file.read_text(encoding="utf-8"))["license"])
    file.unlink()
    monkeypatch.setattr(bundle, "list_licences", lambda names: [])
    with pytest.raises(UserError, match="licence of its data is not known"):
        inspect.write_croissant(str(data / "drawings"), str(file), None)
    assert not file.exists()
    with pytest.raises(UserError, match="--licence: only --croissant"):
        inspect.InspectConfig("anything", licence="MIT")
