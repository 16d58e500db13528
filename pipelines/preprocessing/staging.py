"""A corpus in the making: finished shards in a hidden folder, which another run can go on with.

    .<name>.partial-<digest of what decides the bytes>/
        train-00000.arrow     a shard, renamed to its name once it is whole
        train-00000.json      beside it, what the manifest will say of it, and its rejected rows
        rejected.jsonl        rows set aside while reading, of the present run
        read.json             what reading gave in all, once the present run has read everything

What decides the bytes is the part of the manifest that is known before the work. So a changed
source, setting or version has another folder and starts anew, and the old folder is removed.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipelines.preprocessing.blocks import json_line
from pipelines.shards.format import MANIFEST, QUARANTINE, write_shard
from skillnet_platform import storage
from skillnet_platform.config import digest
from skillnet_platform.errors import UserError

REJECTED_ROWS = "rejected.jsonl"
READ = "read.json"
LOCK = "lock"


@contextlib.contextmanager
def partial(final: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The folder of a corpus in the making, kept for this process alone while the block runs.

    It stays after an error if it holds a finished shard.

    Args:
        final: the corpus directory.
        identity: what decides the bytes; see ``prepare.identity_of``.

    Raises:
        UserError: another process prepares the same corpus.
    """
    folder = final.with_name(f".{final.name}.partial-{digest(identity)[:16]}")
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


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Entries of the shards that are there and whole, by stem ("train-00003").

    Each shard is hashed; what does not agree with its entry is removed, to be made again.
    """
    stems = sorted(path.stem for path in folder.glob("*-*.json"))
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
        entries = dict(zip(stems, pool.map(lambda s: _whole(folder, s), stems), strict=True))
    return {stem: entry for stem, entry in entries.items() if entry is not None}


def write_entry(
    folder: Path,
    split: str,
    shard: int,
    table: pa.Table,
    rejected: list[dict[str, Any]],
    keys: str,
) -> dict[str, Any]:
    """Write a shard and the entry beside it; returns the entry.

    Names and content depend on the rows alone, never on the task that writes them: a repeated
    task writes the same again.

    Args:
        folder: see ``partial``; all nodes see it.
        split: of the rows.
        shard: its number.
        table: the good rows; without any, no shard is written, only the entry.
        rejected: lines of the quarantine.
        keys: digest of the raw rows' keys; see ``blocks.Block``.

    Raises:
        UserError: the disk is full.
    """
    stem = stem_of(split, shard)
    entry: dict[str, Any] = {"split": split, "shard": shard, "keys": keys, "file": None}
    if table.num_rows:
        final = folder / f"{stem}.arrow"
        aside = final.with_name(f".{stem}.{os.uname().nodename}.{os.getpid()}.tmp")
        try:
            entry["file"] = write_shard(table, aside) | {"file": final.name}
            aside.replace(final)
        finally:
            aside.unlink(missing_ok=True)
    storage.write_json(folder / f"{stem}.json", entry | {"rejected": rejected})
    return entry | {"rejected": rejected}


def stem_of(split: str, shard: int) -> str:
    """Name of a shard's files, without their endings."""
    return f"{split}-{shard:05d}"


def gather(folder: Path, shards: dict[str, int]) -> tuple[dict[str, Any], Counter[str], int]:
    """Splits for the manifest, out of the entries in their order; the quarantine file is written.

    Args:
        folder: see ``partial``.
        shards: blocks of each split.

    Returns:
        Split -> rows and shards; reasons of rows that their transform rejected, counted; number
        of lines in the quarantine.
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
                entry = storage.read_json(folder / f"{stem_of(split, shard)}.json")
                if entry["file"] is not None:
                    splits[split]["rows"] += entry["file"]["rows"]
                    splits[split]["shards"].append(entry["file"])
                for row in entry["rejected"]:
                    stream.write(json_line(row))
                    reasons[row["reason"]] += 1
                    lines += 1
    return splits, reasons, lines


def rejected_lines(folder: Path) -> Iterator[str]:
    """Lines of the quarantine as far as it is known."""
    read = folder / REJECTED_ROWS
    if read.exists():
        yield from read.read_text(encoding="utf-8").splitlines(keepends=True)
    for path in sorted(folder.glob("*-*.json")):
        yield from map(json_line, storage.read_json(path)["rejected"])


def commit(folder: Path, final: Path) -> None:
    """Put the finished corpus in place: nothing is left in it that helped to make it."""
    for path in folder.iterdir():
        entry = path.suffix == ".json" and path.name != MANIFEST
        if entry or path.name in (REJECTED_ROWS, LOCK) or path.name.startswith("."):
            path.unlink()
    storage.commit_directory(folder, final)


def _whole(folder: Path, stem: str) -> dict[str, Any] | None:
    path = folder / f"{stem}.arrow"
    try:
        entry: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        said = entry["file"]
        if said is None and not path.exists():
            return entry
        same = path.stat().st_size == said["bytes"]
        if same and storage.sha256_file(path) == said["sha256"]:
            return entry
    except (OSError, ValueError, KeyError, TypeError):
        pass
    (folder / f"{stem}.json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[bytes]]:
    """Hold the lock of a folder. It ends with the process, however that ends."""
    with (folder / LOCK).open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            name = folder.name.split(".")[1]
            raise UserError(
                f"{folder.parent / name}: another process prepares this corpus now. Wait for it, "
                "or give --data another directory."
            ) from None
        yield stream
