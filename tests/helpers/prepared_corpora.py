"""Prepared corpora: without processes, or without ``prepare``, changed with a right digest."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.data.corpora import ExternalCorpus
from pipelines.data.preprocessing import prepare as preparing
from pipelines.data.preprocessing.local_tasks import LocalTasks
from pipelines.data.shards import format as shard_format
from pipelines.data.shards.format import FORMAT_VERSION, SHARD_TABLE, manifest_digest, write_shard
from pipelines.data.shards.row_checks import ROW_CHECKS


def prepare_in_process(patch: pytest.MonkeyPatch) -> None:
    """Prepare in this process, also beside a Ray and with media.

    A task of Ray, and a process for media, imports the libraries of media.
    """
    patch.setattr(preparing, "_start_tasks", lambda *given: LocalTasks(1))


def write_manifest(folder: Path, manifest: Any) -> Path:
    """Write a manifest with its digest, if it can have one; return the folder."""
    if isinstance(manifest, dict):
        manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a manifest whose splits have the entries of their shards, as it is written from."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entries = pa.ipc.open_file((folder / SHARD_TABLE).read_bytes()).read_all().to_pylist()
    for _, split in sorted(manifest["splits"].items()):
        own, entries = entries[: split["shards"]], entries[split["shards"] :]
        split["shards"] = [entry | {"sha256": entry["sha256"].hex()} for entry in own]
    return manifest


def write_corpus(folder: Path, splits: Mapping[str, Sequence[pa.Table]], **entries: Any) -> Path:
    """Write a corpus with a shard for each table; ``entries`` are of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {}
    for split, tables in splits.items():
        shards = [
            write_shard(table, folder / f"{split}-{number:05d}.arrow")
            for number, table in enumerate(tables)
        ]
        described[split] = {"rows": sum(map(len, tables)), "shards": shards}
    total = sum(split["rows"] for split in described.values())
    manifest = {
        "format_version": FORMAT_VERSION,
        "corpus": "made",
        "modality": "text",
        "task": "text_classification",
        "schema": {field.name: str(field.type) for field in next(iter(splits.values()))[0].schema},
        "splits": described,
        "sources": [],
        "preprocessing": {},
        "preprocessing_digest": "",
        "rows_in": total,
        "rows_out": total,
        "quarantine": {},
    }
    shard_format.write_corpus_manifest(folder, manifest | entries)
    return folder


def change_corpus(
    folder: Path,
    edit: Callable[[str, pa.Table], pa.Table] | None = None,
    change: Callable[[dict[str, Any]], object] | None = None,
    **entries: Any,
) -> dict[str, Any]:
    """Change a corpus; return its manifest.

    Args:
        folder: directory of the corpus.
        edit: (split, rows of a shard) -> other rows.
        change: alters the manifest, whose splits have entries of their shards.
        entries: keys and values of the manifest.
    """
    manifest = read_manifest(folder)
    for split, described in manifest["splits"].items() if edit else ():
        assert edit is not None
        for shard in described["shards"]:
            path = folder / shard["file"]
            table = edit(split, pa.ipc.open_file(path.read_bytes()).read_all().combine_chunks())
            path.unlink()  # it may be mapped
            shard |= write_shard(table, path)
        described["rows"] = sum(shard["rows"] for shard in described["shards"])
    manifest |= entries
    if change is not None:
        change(manifest)
    return shard_format.write_corpus_manifest(folder, manifest)


def swap_test(manifest: dict[str, Any]) -> None:
    """Make the rows of the validation split those of the test."""
    manifest["splits"]["test"] = manifest["splits"]["validation"]


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """Return a table with other values of a column, which keeps its type."""
    place, field = table.schema.get_field_index(name), table.schema.field(name)
    return table.set_column(place, field, pa.array(values, field.type))


def write_empty_corpus(data: Path, corpus: ExternalCorpus) -> None:
    """Write a corpus of a user whose manifest is true and whose only shard is empty."""
    corpus.scan_labels()
    about = {"corpus": corpus.name, "modality": corpus.modality, "task": corpus.task}
    about |= preparing.build_corpus_identity(corpus, corpus.extra_sources(), data)
    about |= {**corpus.facts(), ROW_CHECKS: {}}
    write_corpus(data / corpus.name, {"train": [pa.table({"key": ["a"]})]}, **about)
