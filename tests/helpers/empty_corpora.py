"""Corpora of a user whose manifest is true and whose only shard is empty, without Ray."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.corpora import ExternalCorpus
from pipelines.data.preprocessing import prepare as preparing
from pipelines.data.shards.format import FORMAT_VERSION, manifest_digest, write_shard
from pipelines.data.shards.row_checks import ROW_CHECKS


def write_empty_corpus(data: Path, corpus: ExternalCorpus) -> None:
    """Write a manifest and an empty shard, as if the corpus was prepared."""
    corpus.scan_labels()
    home = data / corpus.name
    home.mkdir(parents=True)
    entry = write_shard(pa.table({"key": ["a"]}), home / "train-00000.arrow")
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "corpus": corpus.name,
        "modality": corpus.modality,
        "task": corpus.task,
        "splits": {"train": {"rows": 1, "shards": [entry]}},
        **preparing.build_corpus_identity(corpus, corpus.extra_sources(), data),
        **corpus.facts(),
        "rows_in": 1,
        "rows_out": 1,
        "quarantine": {},
        ROW_CHECKS: {},
    }
    manifest["digest"] = manifest_digest(manifest)
    (home / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
