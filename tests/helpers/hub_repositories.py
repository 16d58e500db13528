"""Repositories of the Hugging Face Hub in folders, with the files that the Hub writes."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Type of a column of images or audio.
MEDIA_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_repository(
    folder: Path,
    columns: dict[str, Any],
    splits: dict[str, list[dict[str, Any]]],
    shards: int = 1,
    config: str = "data",
) -> Path:
    """Write a repository: README.md and Parquet shards with features in their schema metadata.

    Args:
        folder: directory of the repository.
        columns: column -> "Image", "Audio", the names of its classes, or an Arrow type.
        splits: name of a split -> its rows.
        shards: files per split.
        config: folder of the files.
    """
    fields, features = [], {}
    for name, kind in columns.items():
        if isinstance(kind, str):
            fields.append(pa.field(name, MEDIA_STRUCT))
            features[name] = {"_type": kind}
        elif isinstance(kind, list):
            fields.append(pa.field(name, pa.int64()))
            features[name] = {"names": kind, "_type": "ClassLabel"}
        else:
            fields.append(pa.field(name, kind))
            features[name] = {"dtype": str(kind), "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(fields, metadata=metadata)
    (folder / config).mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A corpus\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")
    for split, rows in splits.items():
        size = -(-len(rows) // shards)
        for number in range(shards):
            part = rows[number * size : (number + 1) * size]
            table = pa.Table.from_pylist(part, schema=schema)
            name = f"{split}-{number:05d}-of-{shards:05d}.parquet"
            pq.write_table(table, folder / config / name, row_group_size=5)
    return folder


def embed(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    """Return a value of a media column."""
    return {"bytes": data, "path": path}
