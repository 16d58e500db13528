"""Exact set of keys whose memory does not grow with their number."""

import sqlite3
import tempfile
from hashlib import blake2b
from pathlib import Path

#: Digests that are kept in memory. More of them are moved to a file.
MAX_KEYS_IN_MEMORY = 1 << 16


class KeySet:
    """Set of any number of keys. Leave its ``with`` block to remove its file.

    The set stores digests of 128 bits: among 100 million keys, two different keys share a digest
    with a probability below 1e-22.

    Args:
        in_memory: digests that are kept in memory.
    """

    def __init__(self, in_memory: int = MAX_KEYS_IN_MEMORY) -> None:
        self._recent: set[bytes] = set()
        self._in_memory = in_memory
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._table: sqlite3.Connection | None = None

    def __enter__(self) -> "KeySet":
        return self

    def __exit__(self, *error: object) -> None:
        if self._table is not None:
            self._table.close()
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, key: str) -> bool:
        """Add a key; return ``False`` if the set had it already."""
        digest = digest_key(key)
        if digest in self._recent or self._is_in_file(digest):
            return False
        self._recent.add(digest)
        if len(self._recent) >= self._in_memory:
            self._flush()
        return True

    def __contains__(self, key: str) -> bool:
        digest = digest_key(key)
        return digest in self._recent or self._is_in_file(digest)

    def _is_in_file(self, digest: bytes) -> bool:
        if self._table is None:
            return False
        rows = self._table.execute("SELECT 1 FROM seen WHERE key = ?", (digest,))
        return rows.fetchone() is not None

    def _flush(self) -> None:
        if self._table is None:
            self._folder = tempfile.TemporaryDirectory(prefix="skillnet-keys-")
            self._table = open_scratch_database(Path(self._folder.name) / "keys")
            self._table.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._table.execute("BEGIN")
        # Sorted keys fill the pages of the B-tree in order, which is much faster.
        rows = ((digest,) for digest in sorted(self._recent))
        self._table.executemany("INSERT INTO seen VALUES (?)", rows)
        self._table.execute("COMMIT")
        self._recent.clear()


def open_scratch_database(path: Path) -> sqlite3.Connection:
    """Create a database that nobody reads after this process: without a journal.

    Args:
        path: file of the database.
    """
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA cache_size = -16384")
    return database


def digest_key(key: str) -> bytes:
    """Return a digest of a key of 128 bits."""
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
