"""Arrow shards and their manifest: writing, opening, verifying.

A shard is at once an Arrow IPC *file* and an Arrow IPC *stream*. ``pyarrow.ipc.open_file`` and
Polars read the file form, from the footer at the end; ``datasets.Dataset.from_file`` reads only
the stream form, from the schema message at the front. The two differ in the first eight bytes,
a magic that readers of the file form do not look at (they check the one at the end). Here those
eight bytes become the length prefix of the schema message, and eight bytes of padding after its
metadata keep every offset of the footer right.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from skillnet_platform.config import digest as digest_of
from skillnet_platform.errors import UserError
from skillnet_platform.storage import disk_guard, sha256_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
#: Keys of a manifest that tell how it was made and do not count for its digest.
NOT_DIGESTED = ("digest", "made_with")

_MAGIC = b"ARROW1\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"


def shard_bytes(table: pa.Table) -> bytes:
    """One record batch as Arrow IPC, file and stream form in one. Equal tables, equal bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(table.num_rows, 1))
    data = sink.getvalue().to_pybytes()
    (length,) = struct.unpack_from("<i", data, 12)
    assert data[:12] == _MAGIC + _CONTINUATION, "pyarrow wrote an unexpected file header"
    metadata = data[16 : 16 + length]
    return _CONTINUATION + struct.pack("<i", length + 8) + metadata + bytes(8) + data[16 + length :]


def write_shard(table: pa.Table, path: Path) -> dict[str, Any]:
    """Write a shard; returns its entry in the manifest: file, rows, bytes, sha256.

    Raises:
        UserError: the disk is full.
    """
    data = shard_bytes(table)
    with disk_guard(path, len(data)):
        path.write_bytes(data)
    return {
        "file": path.name,
        "rows": table.num_rows,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The digest of a corpus: of all of its manifest but how it was made."""
    return digest_of({k: v for k, v in manifest.items() if k not in NOT_DIGESTED})


@dataclass(frozen=True)
class Split:
    """Some shards of a corpus, in order."""

    name: str
    directory: Path
    shards: tuple[dict[str, Any], ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(shard["rows"] for shard in self.shards)

    def table(self) -> pa.Table:
        """All rows, memory-mapped: nothing is copied, a chunk for each shard.

        Raises:
            UserError: a shard is missing or not an Arrow file.
        """
        return self._table

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of ``table()``.

        Raises:
            UserError: there is no such column.
        """
        if name not in self._table.column_names:
            raise UserError(
                f"{self.directory}: split {self.name} has no column {name!r}; "
                f"known: {', '.join(self._table.column_names)}"
            )
        return self._table.column(name)

    @cached_property
    def _table(self) -> pa.Table:
        return pa.concat_tables([_open_shard(self.directory, shard) for shard in self.shards])


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened."""

    path: Path
    manifest: dict[str, Any]
    splits: dict[str, Split] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name, "headings" for example."""
        return str(self.manifest["corpus"])

    @property
    def modality(self) -> str:
        """What its rows are: text, sound, image, video or code."""
        return str(self.manifest["modality"])

    @property
    def task(self) -> str:
        """The task that it is for."""
        return str(self.manifest["task"])

    @property
    def digest(self) -> str:
        """Of its whole manifest, so of every byte of its shards."""
        return str(self.manifest["digest"])

    @property
    def rows(self) -> int:
        """Rows of all splits."""
        return sum(split.rows for split in self.splits.values())

    @property
    def schema(self) -> pa.Schema:
        """The columns of the training split (of the first one, without training)."""
        split = self.splits.get("train") or next(iter(self.splits.values()))
        return split.table().schema


def open_corpus(path: str | Path, verify: bool = False) -> Corpus:
    """Open a prepared corpus.

    Args:
        path: its directory.
        verify: hash every shard first.

    Raises:
        UserError: there is no manifest, it has another version or was edited, or a shard is
            missing, has another size or (with ``verify``) another content.
    """
    directory = Path(path)
    manifest = _read_manifest(directory)
    for shard in _all_shards(manifest):
        _check_size(directory, shard)
    if verify:
        _check_digests(directory, manifest)
    splits = {
        name: Split(name, directory, tuple(entry["shards"]))
        for name, entry in manifest["splits"].items()
    }
    return Corpus(directory, manifest, splits)


def verify_corpus(path: str | Path) -> dict[str, Any]:
    """Hash every shard of a prepared corpus; returns its manifest.

    Raises:
        UserError: naming the first shard that is missing or was altered.
    """
    return open_corpus(path, verify=True).manifest


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    again = f"Run `skillnet prepare {directory.name}`."
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        state = "not a prepared corpus (no manifest.json)" if directory.is_dir() else "missing"
        raise UserError(f"{directory}: {state}. {again}") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not JSON ({problem}). Delete {directory}. {again}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this program reads {FORMAT_VERSION}. {again}"
        )
    if manifest_digest(manifest) != manifest.get("digest"):
        raise UserError(f"{path}: changed after it was written. Delete {directory}. {again}")
    wrong = _wrong_key(path, manifest)
    if wrong:
        raise UserError(f"{path}: {wrong} is missing or damaged. Delete {directory}. {again}")
    return manifest


def _wrong_key(path: Path, manifest: dict[str, Any]) -> str | None:
    """The first key that a corpus cannot do without and that is not what it must be.

    Raises:
        ValueError: a shard that lies outside of the corpus.
    """
    from skillnet.files import check_inside

    for key in ("corpus", "modality", "task"):
        if not isinstance(manifest.get(key), str):
            return key
    splits = manifest.get("splits")
    if not isinstance(splits, dict) or not splits:
        return "splits"
    for name, entry in splits.items():
        shards = entry.get("shards") if isinstance(entry, dict) else None
        if not isinstance(shards, list) or not all(isinstance(each, dict) for each in shards):
            return f"splits.{name}.shards"
        for shard in shards:
            for key, kind in (("file", str), ("rows", int), ("bytes", int), ("sha256", str)):
                value = shard.get(key)
                if type(value) is not kind or (kind is int and value < 0):
                    return f"splits.{name}.shards.{key}"
            check_inside(path, shard["file"], deep=True)
    return None


def _all_shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for entry in manifest["splits"].values() for shard in entry["shards"]]


def _check_size(directory: Path, shard: dict[str, Any]) -> None:
    path = directory / shard["file"]
    again = f"Delete {directory} and run `skillnet prepare {directory.name}`."
    if not path.is_file():
        raise UserError(f"{path}: this shard is missing. {again}")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise UserError(
            f"{path}: this shard was altered: {size} bytes, expected {shard['bytes']}. {again}"
        )


def _check_digests(directory: Path, manifest: dict[str, Any]) -> None:
    for shard in _all_shards(manifest):
        path = directory / shard["file"]
        found = sha256_file(path)
        if found != shard["sha256"]:
            raise UserError(
                f"{path}: this shard was altered: sha256 {found}, expected {shard['sha256']}. "
                f"Delete {directory} and run `skillnet prepare {directory.name}`."
            )
        try:
            # Whoever writes a shard may write its digest: offsets that lead astray are found here.
            _open_shard(directory, shard).validate(full=True)
        except pa.ArrowInvalid as problem:
            raise UserError(
                f"{path}: not a readable shard ({problem}). Delete {directory} and run "
                f"`skillnet prepare {directory.name}`."
            ) from None


def _open_shard(directory: Path, shard: dict[str, Any]) -> pa.Table:
    path = directory / shard["file"]
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.num_rows != shard["rows"]:
            raise pa.ArrowInvalid(f"{table.num_rows} rows, expected {shard['rows']}")
        return table
    except FileNotFoundError:
        raise UserError(
            f"{path}: this shard is missing. Run `skillnet prepare {directory.name}`."
        ) from None
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as problem:
        raise UserError(
            f"{path}: not a readable shard ({problem}). Delete {directory} and run "
            f"`skillnet prepare {directory.name}`."
        ) from None
