"""The description of one corpus to prepare, which the driver and all tasks share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.data.corpora.base import Corpus, SourceArchives
from pipelines.data.preprocessing.remote_staging import RemoteStaging


@dataclass(frozen=True)
class CorpusJob:
    """One corpus to prepare: its sources, its destination and its state before the run.

    ``prepare`` fills the first six fields. ``pipeline.write_corpora`` adds the others.

    Args:
        corpus: reads and transforms the rows.
        sources: downloaded archives of the corpus.
        final_dir: directory of the finished corpus.
        identity: part of the manifest that is known before the work and that decides the bytes;
            see ``prepare.build_corpus_identity``.
        tokenizer: tokenizer file on this node, if the corpus has text columns.
        spool: file of blocks that were read before, if the tokenizer was trained on them.
        staging_dir: directory of unfinished work; all nodes see it unless ``remote`` is set.
        finished_keys: stem of a finished shard -> digest of the keys of its rows. Blocks with an
            equal digest are not prepared again.
        remote: destination of the shards, if the corpus is prepared into an object store.
    """

    corpus: Corpus
    sources: SourceArchives
    final_dir: Path
    identity: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    spool: Path | None = None
    staging_dir: Path = Path()
    finished_keys: dict[str, str] = field(default_factory=dict)
    remote: RemoteStaging | None = None
