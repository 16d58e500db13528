"""``skillnet prepare --data s3://…``: the corpus as on the disk, sent once, kept through faults."""

from pathlib import Path
from typing import Any

import pytest

from pipelines import prepare as preparing
from pipelines.prepared_store import staging_folder
from pipelines.shards import open_corpus
from skillnet_platform import remote
from tests.made_corpora import put_archive
from tests.object_store import ObjectStore

pytestmark = pytest.mark.integration
MADE = "tests.made_corpora:Made"


def test_a_corpus_is_prepared_into_a_store(
    object_store: ObjectStore,
    run_root: Path,
    tmp_path: Path,
    ray_session: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archives = put_archive(tmp_path / "archives")
    uri = object_store.uri
    arguments = [MADE, "--data", uri, "--archives", str(archives)]
    put, sent = remote.put_file, []
    monkeypatch.setattr(remote, "put_file", lambda a, b: (sent.append(b), put(a, b)))

    # The store goes while the corpus is prepared: it is whole here, and the same command sends it.
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "1")
    prepare = preparing.prepare

    def prepare_and_lose_the_store(*given: Any, **more: Any) -> Any:
        done = prepare(*given, **more)
        object_store.door.shut()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "prepare", prepare_and_lose_the_store)
        assert preparing.main(arguments) == 1
    assert "did not answer for 1 s" in capsys.readouterr().err
    object_store.door.unshut()
    assert not remote.is_committed(f"{uri}/made")
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "60")
    assert preparing.main(arguments) == 0
    assert "sent" in capsys.readouterr().err
    here, there = open_corpus(staging_folder(uri) / "made"), open_corpus(f"{uri}/made", verify=True)
    assert there.manifest == here.manifest
    shards = {entry["file"] for split in there.splits.values() for entry in split.shards}
    assert shards <= {entry.name for entry in remote.list_files(f"{uri}/made")}

    # Nothing changed: nothing is prepared, and no shard is sent.
    sent.clear()
    assert preparing.main(arguments) == 0
    assert not [place for place in sent if place.endswith(".arrow")]
    assert "unchanged" in capsys.readouterr().err


def test_a_missing_bucket_is_found_before_the_work(
    object_store: ObjectStore, run_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preparing.main([MADE, "--data", "s3://nowhere/corpora"]) == 2
    assert "no bucket 'nowhere'" in capsys.readouterr().err
    assert preparing.main([MADE, "--archives", "s3://nowhere/archives"]) == 2
    assert "archives takes a folder on this machine" in capsys.readouterr().err
