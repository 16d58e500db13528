"""Arrow IPC shards of a prepared corpus: format, verification, and reading."""

from pipelines.shards.dataset import open_corpus, verify_corpus

__all__ = ["open_corpus", "verify_corpus"]
