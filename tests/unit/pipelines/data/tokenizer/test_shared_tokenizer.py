"""Preparing into a store uses the tokenizer of its corpora, and not a local leftover."""

import json
import uuid
from pathlib import Path

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.preprocessing import prepare as preparing
from pipelines.data.preprocessing import remote_staging
from pipelines.data.tokenizer import selection
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.tokenizer.training import TOKENIZER, TOKENIZER_MANIFEST
from skillnet_platform import cluster
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, sha256_file
from tests.helpers.user_corpora import tnews


@pytest.fixture
def uri(run_root: Path) -> str:
    return f"memory://{uuid.uuid4().hex}"


def learnt(path: Path, text: str) -> Path:
    path.write_text(tokenizers.train_tokenizer([text] * 3, [], size=400), encoding="utf-8")
    return path


def put(uri: str, tokenizer: Path, *corpora: str) -> None:
    """Create a store with a tokenizer and corpora that use it."""
    directories.put_file(tokenizer, f"{uri}/{TOKENIZER}")
    for name in corpora:
        reported = {"corpus": name, "tokenizer": {"sha256": sha256_file(tokenizer)}}
        directories.write_bytes(f"{uri}/{name}/manifest.json", json.dumps(reported).encode())


@pytest.mark.parametrize("lesson", ["their own", selection.LEARN])
def test_tokenizer_of_a_stores_corpora_is_not_replaced(uri, tmp_path, monkeypatch, lesson):
    put(uri, learnt(tmp_path / "before.json", "苹果和梨"), "headlines", "functions")
    before = directories.read_bytes(f"{uri}/{TOKENIZER}")
    if lesson != selection.LEARN:
        lesson = str(learnt(tmp_path / "tokenizer.json", "桌子和椅子"))

    def no_ray(*_: object) -> None:
        raise AssertionError("refused before Ray starts")

    monkeypatch.setattr(cluster, "ensure_ray", no_ray)
    corpus = open_external_corpus("headlines", f"tnews:{tnews(tmp_path / 'tnews')}")
    with (
        pytest.raises(UserError, match=rf"{uri}/{TOKENIZER}: functions there are prepared with it"),
        remote_staging.stage_locally(uri) as here,
    ):
        preparing.prepare([], here, tmp_path, external=[corpus], tokenizer=lesson, store=uri)
    assert directories.read_bytes(f"{uri}/{TOKENIZER}") == before


def test_tokenizer_of_the_store_replaces_a_local_leftover(uri: str, tmp_path: Path) -> None:
    old, new = learnt(tmp_path / "old.json", "苹果"), learnt(tmp_path / "new.json", "桌子")
    put(uri, old)
    with remote_staging.stage_locally(uri) as here:
        assert (here / TOKENIZER).read_bytes() == old.read_bytes()
        (here / TOKENIZER_MANIFEST).write_text("{}")
    put(uri, new)  # by another host
    with remote_staging.stage_locally(uri) as here:
        assert (here / TOKENIZER).read_bytes() == new.read_bytes()
        assert not (here / TOKENIZER_MANIFEST).exists(), "it speaks of the old one"
    assert directories.read_bytes(f"{uri}/{TOKENIZER}") == new.read_bytes()
