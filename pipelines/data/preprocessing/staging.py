"""Staging directory of one corpus: its finished shards, from which a later run can resume.

    .<name>.partial-<digest of the identity>/
        train-00000.arrow     a shard, renamed to this name once it is complete
        train-00000.json      its entry for the manifest, and its rejected rows
        rejected.jsonl        rows rejected while reading, in the present run
        read.json             counts of all rows, once the present run has read everything

The identity is the part of the manifest that is known before the work. A changed source, setting
or version gives another digest, so the work starts from scratch in another directory and the old
directory is removed.
"""

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.io.source_file import format_json_line
from pipelines.data.shards.format import QUARANTINE, SHARD_TABLE, read_shard_names, write_shard
from pipelines.data.shards.row_checks import ShardDigests
from skillnet_files.commit import temporary_file
from skillnet_platform import storage
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError
from skillnet_platform.storage.locks import hold_lock

REJECTED_ROWS = "rejected.jsonl"
READ_SUMMARY = "read.json"
LOCK = "lock"
_ENTRY_NAME = re.compile(r".+-\d{5}\.json")


@contextlib.contextmanager
def staging_dir(final: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Create and lock the staging directory of a corpus while the block runs.

    After an error the directory stays if it holds a finished shard.

    Args:
        final: directory of the finished corpus.
        identity: decides the bytes of the corpus; see ``prepare.build_corpus_identity``.

    Raises:
        UserError: another process prepares the same corpus.
    """
    folder = staging_path(final, identity)
    # Staging directories of other identities are obsolete. The lock protects a running process.
    for other in final.parent.glob(f".{final.name}.partial-*"):
        if other != folder:
            with _locked(other):
                shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        try:
            yield folder
        finally:
            if folder.exists() and not any(folder.glob("*.arrow")):
                shutil.rmtree(folder)


def finished_shards(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of all verified shards by stem ("train-00003").

    Each shard is hashed. A shard that differs from its entry is removed and prepared again.
    """
    stems = sorted(path.stem for path in folder.glob("*-*.json"))
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        entries = dict(zip(stems, pool.map(lambda s: _read_entry(folder, s), stems), strict=True))
    return {stem: entry for stem, entry in entries.items() if entry is not None}


def write_shard_entry(
    folder: Path,
    split: str,
    shard: int,
    table: pa.Table,
    rejected: list[dict[str, Any]],
    keys: str,
    checks: ShardDigests,
) -> dict[str, Any]:
    """Write a shard and its entry; return the entry.

    Names and content depend on the rows alone and not on the task that writes them, so a
    repeated task writes the same bytes.

    Args:
        folder: see :func:`staging_dir`.
        split: split of the rows.
        shard: index of the shard in its split.
        table: accepted rows. If it is empty, only the entry is written.
        rejected: lines of the quarantine.
        keys: digest of the raw rows' keys; see ``blocks.RowBlock``.
        checks: digests of the accepted rows; see
            :func:`pipelines.data.shards.row_checks.digest_shard`.

    Raises:
        UserError: the disk is full.
    """
    stem = shard_stem(split, shard)
    entry: dict[str, Any] = {"split": split, "shard": shard, "keys": keys, "file": None}
    if table.num_rows:
        final = folder / f"{stem}.arrow"
        # Two attempts of one task may write at the same time, each to its own file.
        with temporary_file(final) as temporary:
            entry["file"] = write_shard(table, temporary) | {"file": final.name}
            temporary.replace(final)  # atomic: a reader sees a complete shard or none
    entry |= {"rejected": rejected, "checks": checks}
    storage.write_json(folder / f"{stem}.json", entry)
    return entry


def shard_stem(split: str, shard: int) -> str:
    """Return the name of a shard's files without their suffixes.

    Args:
        split: split of the shard.
        shard: index in the split.
    """
    return f"{split}-{shard:05d}"


def gather_entries(
    folder: Path, shards: dict[str, int]
) -> tuple[dict[str, Any], Counter[str], int]:
    """Collect the splits of the manifest from the entries, and write the quarantine file.

    Args:
        folder: see :func:`staging_dir`.
        shards: split -> number of blocks.

    Returns:
        Split -> rows and shards; reason -> rows that the transform rejected; lines of the
        quarantine.
    """
    splits: dict[str, Any] = {split: {"rows": 0, "shards": []} for split in sorted(shards)}
    reasons = Counter[str]()
    lines = 0
    with storage.atomic_write(folder / QUARANTINE, "w") as stream:
        with (folder / REJECTED_ROWS).open(encoding="utf-8") as read:
            for line in read:
                stream.write(line)
                lines += 1
        for split, count in sorted(shards.items()):
            for shard in range(count):
                entry = storage.read_json(folder / f"{shard_stem(split, shard)}.json")
                if entry["file"] is not None:
                    splits[split]["rows"] += entry["file"]["rows"]
                    splits[split]["shards"].append(entry["file"])
                for row in entry["rejected"]:
                    stream.write(format_json_line(row))
                    reasons[row["reason"]] += 1
                    lines += 1
    return splits, reasons, lines


def iter_shard_digests(folder: Path, shards: dict[str, int]) -> Iterator[tuple[str, ShardDigests]]:
    """Yield the split of each shard, and the digests of its rows.

    Args:
        folder: see :func:`staging_dir`.
        shards: split -> number of blocks.
    """
    for split, count in sorted(shards.items()):
        for shard in range(count):
            yield split, storage.read_json(folder / f"{shard_stem(split, shard)}.json")["checks"]


def iter_rejected_lines(folder: Path) -> Iterator[str]:
    """Yield the lines of the quarantine that are known so far."""
    read = folder / REJECTED_ROWS
    if read.exists():
        yield from read.read_text(encoding="utf-8").splitlines(keepends=True)
    for path in sorted(folder.glob("*-*.json")):
        yield from map(format_json_line, storage.read_json(path)["rejected"])


def commit_corpus(folder: Path, final: Path) -> None:
    """Rename the staging directory to the final directory, then remove its temporary files.

    A kill at any moment leaves the old or the new corpus. Until the rename, the staging directory
    keeps the entries of all shards, so the next run publishes them again. After it,
    :func:`finish_commit` removes what is left.

    Args:
        folder: see :func:`staging_dir`; it holds the manifest.
        final: directory of the finished corpus.
    """
    listed = {SHARD_TABLE, *read_shard_names(folder)}
    # A kill during an earlier commit may have left shards of a replaced corpus here.
    for path in folder.glob("*.arrow"):
        if path.name not in listed:
            path.unlink()
    storage.commit_directory(folder, final)
    _remove_staging_files(final)


def finish_commit(final: Path, folder: Path) -> None:
    """Remove what a killed commit left of a corpus that is current.

    Args:
        final: directory of the finished corpus.
        folder: its staging directory, which may hold a replaced corpus; see :func:`staging_path`.
    """
    _remove_staging_files(final)
    storage.restore_replaced(final)
    if folder.is_dir():
        # The lock belongs to a process that removes the directory itself.
        with contextlib.suppress(UserError), _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def staging_path(final: Path, identity: dict[str, Any]) -> Path:
    """Return the staging directory of a corpus.

    Args:
        final: directory of the finished corpus.
        identity: decides the bytes of the corpus; see ``prepare.build_corpus_identity``.
    """
    return final.with_name(f".{final.name}.partial-{digest_config(identity)[:16]}")


def _remove_staging_files(final: Path) -> None:
    for path in final.iterdir():
        is_temporary = path.name.startswith(".") and path.suffix == ".tmp"
        is_named = path.name in (REJECTED_ROWS, READ_SUMMARY, LOCK)
        if is_named or is_temporary or _ENTRY_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _read_entry(folder: Path, stem: str) -> dict[str, Any] | None:
    """Return the entry of a verified shard; remove the files of any other shard."""
    path = folder / f"{stem}.arrow"
    try:
        entry: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        recorded = entry["file"]
        if recorded is None and not path.exists() and "checks" in entry:
            return entry
        # The size is compared first, because hashing reads the complete file.
        same_size = path.stat().st_size == recorded["bytes"]
        if same_size and "checks" in entry and storage.sha256_file(path) == recorded["sha256"]:
            return entry
    except (OSError, ValueError, KeyError, TypeError):
        pass
    (folder / f"{stem}.json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return None


def _locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a directory. The operating system releases it when the process ends."""
    corpus = folder.with_name(folder.name.split(".")[1])

    def describe(holder: str) -> str:
        return (
            f"{corpus}: {holder} prepares this corpus now. Wait for it, or give --data another "
            "directory."
        )

    return hold_lock(folder / LOCK, describe)
