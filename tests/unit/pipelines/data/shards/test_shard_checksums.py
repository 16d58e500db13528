"""A shard is hashed once before it is read, and again when it may have changed."""

import os
from pathlib import Path

import pytest

from pipelines.data.shards import files
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import SHARD_TABLE
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import write_corpora


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpora(tmp_path / "data") / "headings"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of hashed shards, and not of their table."""
    names: list[str] = []
    real = files.sha256_file

    def counting(path: Path) -> str:
        if path.name != SHARD_TABLE:
            names.append(path.name)
        return real(path)

    monkeypatch.setattr(files, "sha256_file", counting)
    return names


def flip(path: Path, position: int = 700) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def test_flipped_bit_is_reported_when_the_shard_is_opened(corpus: Path) -> None:
    flip(corpus / "train-00001.arrow")
    opened = open_corpus(corpus)
    opened.splits["test"].table()
    with pytest.raises(UserError, match=r"train-00001\.arrow: this shard was altered: sha256"):
        opened.splits["train"].table()
    flip(corpus / "train-00001.arrow")
    assert open_corpus(corpus).splits["train"].table().num_rows == 45


def test_shard_is_hashed_once(corpus: Path, hashed: list[str]) -> None:
    open_corpus(corpus).splits["train"].table()
    assert sorted(hashed) == ["train-00000.arrow", "train-00001.arrow"]
    open_corpus(corpus).splits["train"].table()
    assert len(hashed) == 2
    open_corpus(corpus).splits["test"].table()
    assert hashed[2:] == ["test-00000.arrow"]
    open_corpus(corpus).splits["train"].table()
    assert len(hashed) == 3, "notes of other splits stay"


def test_possibly_changed_shard_is_hashed_again(corpus: Path, hashed: list[str]) -> None:
    path = corpus / "train-00000.arrow"
    open_corpus(corpus).splits["train"].table()
    os.utime(path, ns=(1, 1))
    open_corpus(corpus).splits["train"].table()
    assert hashed[2:] == [path.name]
    flip(path)
    with pytest.raises(UserError, match="was altered"):
        open_corpus(corpus).splits["train"].table()


def test_lost_records_only_cost_time(corpus: Path, hashed: list[str]) -> None:
    records = corpus / files.VERIFIED_NOTES
    records.write_text('{"train-')
    open_corpus(corpus).splits["train"].table()
    content = bytearray(records.read_bytes())
    # A record that was written in part, or is of another shard.
    for position in (0, 200):
        content[position] ^= 1
    records.write_bytes(content)
    open_corpus(corpus).splits["train"].table()
    assert len(hashed) == 3
    records.unlink()
    # Nothing can be written there.
    records.mkdir()
    for _ in range(2):
        split = open_corpus(corpus).splits["train"]
        assert split.table().num_rows == 45
        assert split.open_shard(split.shards[0]).table.num_rows > 0
    assert len(hashed) == 7
