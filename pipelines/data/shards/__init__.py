"""Shards of a prepared corpus: Arrow IPC files, their manifest, verification and reading.

:func:`open_corpus` and :func:`verify_corpus` are the public functions.
"""

from pipelines.data.shards.dataset import open_corpus, verify_corpus

__all__ = ["open_corpus", "verify_corpus"]
