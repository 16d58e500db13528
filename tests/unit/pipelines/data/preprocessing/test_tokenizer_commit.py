"""A prepare that is killed between the two files of its tokenizer completes them the next time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import prepare as command
from pipelines.data.preprocessing import prepare as preparation
from skillnet_platform import storage
from tests.helpers import user_corpora


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.manifest.json"])
def test_a_kill_between_the_files_of_a_tokenizer_leaves_no_orphan(
    file, run_root, tmp_path, monkeypatch
):
    user_corpora.tnews(tmp_path / "tnews", train=15, other=5)
    words = ["--corpus", f"tnews={tmp_path / 'tnews'}"]

    write = storage.atomic_write

    @contextlib.contextmanager
    def kill_before(path: Any, *arguments: Any) -> Iterator[Any]:
        if Path(path).name == file:
            raise KeyboardInterrupt
        with write(path, *arguments) as stream:
            yield stream

    with monkeypatch.context() as patch:
        patch.setattr("skillnet_platform.storage.local.atomic_write", kill_before)
        patch.setattr(preparation.storage, "atomic_write", kill_before)
        assert command.main(words) == 130
    assert command.main(words) == 0
    manifest = storage.read_json(run_root / "corpora" / "tokenizer.manifest.json")
    assert manifest["sha256"] == storage.sha256_file(run_root / "corpora" / "tokenizer.json")
    assert manifest["trained_on"] == ["tnews"]
