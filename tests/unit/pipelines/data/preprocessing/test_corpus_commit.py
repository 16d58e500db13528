"""The publication of a prepared corpus is killed at each of its file-system events.

The old or the new corpus is complete after each kill, and no finished shard is made again. Kills of
the complete command: ``tests/integration/test_killed_commands.py``.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.data.preprocessing import staging
from pipelines.data.shards.dataset import verify_corpus
from pipelines.data.shards.files import VERIFIED_NOTES
from pipelines.data.shards.format import (
    FORMAT_VERSION,
    MANIFEST,
    QUARANTINE,
    SHARD_TABLE,
    write_corpus_manifest,
)
from skillnet_files import commit
from skillnet_platform.errors import UserError
from tests.helpers.killed_children import EventCounter, run_killed

SHARDS = 3


def fill_staging(final: Path, rows: int) -> tuple[Path, str]:
    """Make a staging directory that is complete but not published; return it and its digest."""
    folder = final.with_name(f".{final.name}.partial-{rows}")
    folder.mkdir(parents=True)
    files = []
    for shard in range(SHARDS):
        table = pa.table({"key": [f"{rows}/{shard}/{row}" for row in range(rows)]})
        entry = staging.write_shard_entry(folder, "train", shard, table, [], "keys", {})
        files.append(entry["file"])
    for name in (staging.REJECTED_ROWS, staging.READ_SUMMARY, staging.LOCK, QUARANTINE):
        (folder / name).write_text("", encoding="utf-8")
    splits = {"train": {"rows": rows * SHARDS, "shards": files}}
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "corpus": "made",
        "splits": splits,
    }
    manifest |= {"modality": "text", "task": "text_classification"}
    return folder, write_corpus_manifest(folder, manifest)["digest"]


def publish(folder: Path, final: Path, counter: EventCounter | None = None) -> None:
    if counter is not None:
        # The atomic exchange is a system call, which Python does not audit.
        exchange = commit.exchange_paths

        def audited_exchange(one: Path, other: Path) -> bool:
            counter("os.rename")
            return exchange(one, other)

        commit.exchange_paths = audited_exchange
    staging.commit_corpus(folder, final)


def digest_of(corpus: Path) -> str | None:
    try:
        return str(verify_corpus(corpus)["digest"])
    except UserError:
        return None


@pytest.mark.parametrize("replaces", [True, False], ids=["replaces", "is first"])
@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])
def test_a_commit_killed_at_any_event_loses_nothing_and_resumes(
    tmp_path, monkeypatch, can_exchange, replaces
):
    if not can_exchange:
        monkeypatch.setattr(commit, "exchange_paths", lambda one, other: False)
    number = 1
    while True:
        final = tmp_path / str(number) / "made"
        old = None
        if replaces:
            folder, old = fill_staging(final, rows=2)
            publish(folder, final)
        folder, new = fill_staging(final, rows=5)
        is_killed = run_killed(partial(publish, folder, final), number)
        found = digest_of(final)
        # Between two renames neither is in place; the next command restores one of them.
        assert found in ((old, new) if can_exchange else (old, new, None)), f"event {number}"
        if found == new:
            staging.finish_commit(final, folder)
        else:
            assert len(staging.finished_shards(folder)) == SHARDS, f"event {number}: shards lost"
            publish(folder, final)
        assert digest_of(final) == new
        assert sorted(path.name for path in final.parent.iterdir()) == ["made"]
        names = {path.name for path in final.iterdir()} - {VERIFIED_NOTES}
        shards = {f"train-{shard:05d}.arrow" for shard in range(SHARDS)}
        assert names == {MANIFEST, QUARANTINE, SHARD_TABLE, *shards}, f"event {number}"
        if not is_killed:
            break
        number += 1
    assert number > SHARDS


def test_a_corpus_that_is_current_keeps_the_work_of_other_settings(tmp_path: Path) -> None:
    final = tmp_path / "made"
    folder, _ = fill_staging(final, rows=2)
    publish(folder, final)
    other, _ = fill_staging(final, rows=7)
    (final / "README.md").write_text("mine", encoding="utf-8")
    staging.finish_commit(final, folder)
    assert len(staging.finished_shards(other)) == SHARDS
    assert (final / "README.md").is_file()
