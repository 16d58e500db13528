"""Format of a shard and of a corpus manifest.

A shard is an Arrow IPC *file* and an Arrow IPC *stream* at the same time. ``pyarrow.ipc.open_file``
and Polars read the file form, from the footer at the end. ``datasets.Dataset.from_file`` reads
only the stream form, from the schema message at the front. The forms differ in the first eight
bytes: a magic number that readers of the file form ignore, because they check the one at the end.
Here those eight bytes become the length prefix of the schema message. Eight bytes of padding after
its metadata keep all offsets of the footer valid.

The manifest states what is known of the corpus and of each split. Files, sizes and digests of the
shards are rows of ``shards.arrow``, split after split in the order of their names. The manifest has
the digest of that file, so that its own digest covers every byte of the corpus.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.shards.row_checks import ROW_CHECKS
from skillnet_files.commit import temporary_file
from skillnet_platform.config import digest_config as digest_of
from skillnet_platform.storage import disk_guard, sha256_file, write_json

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
SHARD_TABLE = "shards.arrow"
SHARD_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.binary(32)),
    ]
)
QUARANTINE = "quarantine.jsonl"
#: Keys of a manifest that its digest omits: they follow from the rows, or from the machine.
NOT_DIGESTED = ("digest", "made_with", ROW_CHECKS)
_MAGIC = b"ARROW1\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"


def tensor_field(name: str, dtype: pa.DataType, shape: Sequence[int]) -> pa.Field:
    """Return the field of a column of flattened tensors of one shape.

    Args:
        name: name of the column.
        dtype: type of the elements.
        shape: shape of each tensor; the metadata of the field store it.
    """
    size = 1
    for length in shape:
        size *= length
    text = "[" + ",".join(str(length) for length in shape) + "]"
    return pa.field(name, pa.list_(dtype, size), metadata={b"shape": text.encode()})


def shard_bytes(table: pa.Table) -> bytes:
    """Serialize a table as one record batch, file and stream form in one.

    Equal tables give equal bytes.
    """
    sink = pa.BufferOutputStream()
    _write(table, sink)
    data = bytearray(sink.getvalue())
    head = _stream_head(memoryview(data))
    data[: len(head)] = head
    return bytes(data)


def write_shard(table: pa.Table, path: Path) -> dict[str, Any]:
    """Write a shard; return its entry in the manifest: file, rows, bytes, sha256.

    The bytes are those of :func:`shard_bytes`. They are streamed to the disk, and the hash is
    computed from the bytes that the disk returns.

    Args:
        table: rows of the shard.
        path: file to write.

    Raises:
        UserError: the disk is full.
    """
    with disk_guard(path):
        with pa.OSFile(str(path), "wb") as sink:
            _write(table, sink)
        with path.open("r+b") as stream:
            (length,) = struct.unpack_from("<i", stream.read(16), 12)
            stream.seek(0)
            head = _stream_head(memoryview(stream.read(16 + length)))
            stream.seek(0)
            stream.write(head)
            stream.flush()
            # The hash below is recorded as proof, so the bytes must be on the disk.
            os.fsync(stream.fileno())
    return {
        "file": path.name,
        "rows": table.num_rows,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }


def _write(table: pa.Table, sink: Any) -> None:
    # One record batch: equal rows must give equal bytes, independent of the table's chunks.
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(table.num_rows, 1))


def _stream_head(data: memoryview) -> bytes:
    """Return the first bytes of a file, changed so that the file is also a valid stream.

    The number of bytes does not change.
    """
    (length,) = struct.unpack_from("<i", data, 12)
    assert data[:12] == _MAGIC + _CONTINUATION, "pyarrow wrote an unexpected file header"
    return _CONTINUATION + struct.pack("<i", length + 8) + data[16 : 16 + length] + bytes(8)


def write_corpus_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a corpus and the table of its shards; return the manifest.

    Args:
        folder: directory of the corpus.
        manifest: with the ``rows`` of each split, and its ``shards`` as :func:`write_shard`
            returns them. The written manifest has their number and bytes instead.

    Raises:
        UserError: the disk is full.
    """
    splits = manifest["splits"]
    entries = [shard for name in sorted(splits) for shard in splits[name]["shards"]]
    columns = {
        "file": [shard["file"] for shard in entries],
        "rows": [shard["rows"] for shard in entries],
        "bytes": [shard["bytes"] for shard in entries],
        "sha256": [bytes.fromhex(shard["sha256"]) for shard in entries],
    }
    # Another process may have mapped an older table of this name.
    with temporary_file(folder / SHARD_TABLE) as temporary:
        table = write_shard(pa.table(columns, SHARD_SCHEMA), temporary)
        temporary.replace(folder / SHARD_TABLE)
    written = manifest | {
        "shards": table | {"file": SHARD_TABLE},
        "splits": {
            name: {
                "rows": entry["rows"],
                "bytes": sum(shard["bytes"] for shard in entry["shards"]),
                "shards": len(entry["shards"]),
            }
            for name, entry in splits.items()
        },
    }
    written["digest"] = manifest_digest(written)
    write_json(folder / MANIFEST, written)
    return written


def read_shard_names(folder: Path) -> list[str]:
    """Return the files of all shards of a corpus that was just written."""
    names: list[str] = (
        pa.ipc.open_file((folder / SHARD_TABLE).read_bytes()).read_all()["file"].to_pylist()
    )
    return names


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the digest of a corpus: of its manifest without ``NOT_DIGESTED``."""
    return digest_of({k: v for k, v in manifest.items() if k not in NOT_DIGESTED})
