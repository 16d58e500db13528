"""A directory has one tokenizer, even while several prepare runs use it."""

from pathlib import Path

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.preprocessing import prepare as preparing
from pipelines.data.preprocessing import remote_staging
from pipelines.data.preprocessing.remote_staging import RemoteStaging
from pipelines.data.tokenizer import selection
from pipelines.data.tokenizer.training import TOKENIZER, TOKENIZER_MANIFEST
from skillnet_platform import cluster
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, sha256_file, write_json
from tests.helpers.user_corpora import tnews
from tests.unit.pipelines.data.tokenizer.test_shared_tokenizer import learnt, put


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("refused before Ray starts")

    monkeypatch.setattr(cluster, "ensure_ray", refuse)


def test_lock_is_shared_for_use_and_exclusive_for_replacement(tmp_path: Path) -> None:
    with (
        selection.lock_tokenizer(tmp_path),
        selection.lock_tokenizer(tmp_path) as mine,
        pytest.raises(UserError, match="another process prepares corpora with the tokenizer"),
    ):
        mine.exclusive()
    with selection.lock_tokenizer(tmp_path) as mine:
        mine.exclusive()
        with (
            pytest.raises(UserError, match="replaces the tokenizer of this directory now"),
            selection.lock_tokenizer(tmp_path),
        ):
            raise AssertionError("two at once")
    with selection.lock_tokenizer(tmp_path) as mine:
        mine.exclusive()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("lesson", ["their own", selection.LEARN])
def test_prepare_does_not_replace_a_tokenizer_in_use(tmp_path, no_ray, there, lesson):
    data = tmp_path / "data"
    data.mkdir()
    if there:
        learnt(data / TOKENIZER, "苹果和梨")
    if lesson != selection.LEARN:
        lesson = str(learnt(tmp_path / "tokenizer.json", "桌子和椅子"))
    corpus = open_external_corpus("headlines", f"tnews:{tnews(tmp_path / 'tnews')}")
    before = sha256_file(data / TOKENIZER) if there else None
    with (
        selection.lock_tokenizer(data),
        pytest.raises(UserError, match=f"{data}: another process prepares"),
    ):
        preparing.prepare([], data, tmp_path, external=[corpus], tokenizer=lesson)
    assert (sha256_file(data / TOKENIZER) if there else None) == before
    assert (data / TOKENIZER).exists() == there


def test_corpus_is_not_published_beside_another_tokenizer(run_root: Path, tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}-claim"
    put(uri, learnt(tmp_path / "mine.json", "苹果"))
    mine = RemoteStaging.create(uri, "a", tmp_path, sha256_file(tmp_path / "mine.json"))
    put(uri, learnt(tmp_path / "theirs.json", "桌子"))
    with pytest.raises(UserError, match=f"{TOKENIZER}: the tokenizer was replaced by another"):
        mine.commit(tmp_path, {"splits": {}})
    assert not directories.is_committed(f"{uri}/a")


def test_tokenizer_that_was_not_uploaded_yet_stays(run_root: Path, tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}-staged"
    with remote_staging.stage_locally(uri) as here, selection.lock_tokenizer(here) as mine:
        mine.exclusive()
        learnt(here / TOKENIZER, "苹果")
        with (
            pytest.raises(UserError, match="replaces the tokenizer"),
            remote_staging.stage_locally(uri),
        ):
            raise AssertionError("two at once")
        assert (here / TOKENIZER).is_file()


def test_data_path_that_is_a_file_is_rejected(tmp_path: Path, no_ray: None) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="data: a file; expected the directory"):
        preparing.prepare(["drawings"], tmp_path / "data", tmp_path)


def test_unused_trained_tokenizer_is_a_leftover(tmp_path):
    tokenizer = learnt(tmp_path / TOKENIZER, "苹果")
    reported = {"sha256": sha256_file(tokenizer), selection.TRAINED_ON: ["a"]}
    write_json(tmp_path / TOKENIZER_MANIFEST, reported)
    assert not selection.is_leftover_tokenizer(tokenizer, tmp_path), (
        "the user's own, and not learnt"
    )
    write_json(tmp_path / TOKENIZER_MANIFEST, reported | {selection.FINGERPRINT: "of before"})
    assert selection.is_leftover_tokenizer(tokenizer, tmp_path)
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a" / "manifest.json", {"tokenizer": {"sha256": reported["sha256"]}})
    assert not selection.is_leftover_tokenizer(tokenizer, tmp_path)
